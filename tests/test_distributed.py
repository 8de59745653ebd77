"""Two processes equal one, on every engine, for every student and every kind of teacher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed import TESTS, launch
from engine_worker import STEPS, make_trainer
from trainer_setup import weights

CONFIGS = TESTS.parent / "recipes" / "accelerate"
STUDENTS = ("full", "lora")
TEACHERS = ("replicated", "sharded", "recorded")
ALL = [f"gpt2-{s}-{t}" for s in STUDENTS for t in TEACHERS] + ["gpt2-lora-itself"]
UNTIED = [f"llama-{s}-{t}" for s in STUDENTS for t in ("replicated", "sharded")]

SLICE = {
    "ddp": ["gpt2-full-sharded", "gpt2-lora-itself"],
    "zero3": ["gpt2-full-sharded", "gpt2-full-recorded", "gpt2-lora-itself"],
    "fsdp": ["llama-full-sharded", "gpt2-lora-replicated"],
}
GRID = {
    "ddp": ALL,
    "zero1": ALL,
    "zero2": ALL,
    "zero3": [*ALL, *UNTIED],
    "fsdp": [*ALL, *UNTIED],
}

pytestmark = [
    pytest.mark.distributed,
    # peft 0.21 asks for a property that transformers 5.23 has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def config(folder: Path, engine: str) -> Path:
    """The shipped configuration for two CPU processes, at the engine's stage."""
    text = (CONFIGS / "zero3_cpu.yaml").read_text()
    text = text.replace("zero_stage: 3", f"zero_stage: {engine[-1]}")
    lines = [line for line in text.splitlines() if engine == "zero3" or "zero3_" not in line]
    path = folder / f"{engine}.yaml"
    path.write_text("\n".join(lines))
    return path


def on_two(folder: Path, engine: str, script: str, *words: str) -> None:
    if not engine.startswith("zero"):
        launch(script, str(folder), engine, *words)
        return
    done = subprocess.run(
        accelerate(folder, engine, script, *words),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def accelerate(folder: Path, engine: str, script: str, *words: str) -> list[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", str(config(folder, engine)), str(TESTS / script)]
    return [*command, str(folder), engine, *words]


def environment() -> dict[str, str]:
    told = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    return os.environ | told


def check(folder: Path, engine: str, cases: list[str]) -> None:
    on_two(folder, engine, "engine_worker.py", *cases)
    for case in cases:
        found = json.loads((folder / f"{case}.json").read_text())
        assert found["world"] == 2
        # A teacher that is the student's own base equals one with weights of its own.
        single = make_trainer(folder / "one", case.replace("itself", "copy"), processes=1)
        single.train()
        losses = [entry["loss"] for entry in single.state.log_history if "loss" in entry]
        assert len(losses) == STEPS
        assert found["losses"] == pytest.approx(losses, rel=1e-5), case
        after = torch.load(folder / f"{case}.pt", weights_only=True)
        expected = {name: value for name, value in weights(single).items() if name in after}
        assert len(expected) > 4
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", SLICE)
def test_two_processes_equal_one(engine: str, tmp_path: Path) -> None:
    check(tmp_path, engine, SLICE[engine])


@pytest.mark.slow
@pytest.mark.parametrize("engine", GRID)
def test_two_processes_equal_one_everywhere(engine: str, tmp_path: Path) -> None:
    check(tmp_path, engine, GRID[engine])
