"""Two processes equal one, on every engine, for every student and every kind of teacher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from distributed import PYTHONPATH, TESTS, launch
from engine_worker import HOW, STEPS, make_trainer
from trainer_setup import weights
from transformers import GPT2LMHeadModel

from hf_distill import InputError
from hf_distill.training.checkpoints import last_complete_checkpoint

CONFIGS = TESTS.parent / "recipes" / "accelerate"
STUDENTS = ("full", "lora")
TEACHERS = ("replicated", "sharded", "recorded")
ALL = [f"gpt2-{s}-{t}" for s in STUDENTS for t in TEACHERS] + ["gpt2-lora-itself"]
UNTIED = [f"llama-{s}-{t}" for s in STUDENTS for t in ("replicated", "sharded")]

SLICE = {
    "ddp": [
        "gpt2-full-sharded",
        "gpt2-lora-itself",
        "gpt2-full-stream",
        "llama-full-replicated-compiled",
    ],
    "zero3": [
        "gpt2-full-sharded",
        "gpt2-full-recorded",
        "gpt2-lora-itself",
        "gpt2-full-replicated-features",
    ],
    "fsdp": [
        "llama-full-sharded",
        "gpt2-lora-replicated",
        "llama-full-replicated-checkpointed",
        "gpt2-full-replicated-features",
    ],
}
FEATURES = [f"{a}-full-{t}-features" for a in ("gpt2", "llama") for t in ("replicated", "sharded")]
IN_ANOTHER_WAY = [f"llama-full-{t}-{how}" for t in ("replicated", "sharded") for how in HOW]
GRID = {
    "ddp": [*ALL, "gpt2-full-stream", *IN_ANOTHER_WAY, *FEATURES],
    "zero1": ALL,
    "zero2": [*ALL, *FEATURES],
    "zero3": [*ALL, *UNTIED, *IN_ANOTHER_WAY[:2], *FEATURES],
    "fsdp": [*ALL, *UNTIED, *IN_ANOTHER_WAY, *FEATURES],
}

pytestmark = [
    pytest.mark.distributed,
    # peft 0.21 asks for a property that transformers 5.23 has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def config(folder: Path, engine: str) -> Path:
    """The shipped configuration for two CPU processes, at the engine's stage."""
    if engine == "ddp":
        return CONFIGS / "cpu2.yaml"
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
    told = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
    return os.environ | told


def check_equal(folder: Path, engine: str, cases: list[str]) -> None:
    on_two(folder, engine, "engine_worker.py", *cases)
    for case in cases:
        found = json.loads((folder / f"{case}.json").read_text())
        assert found["world"] == 2
        # A teacher that is the student's own base equals one with weights of its own.
        parts = case.replace("itself", "copy").split("-")
        plain = "-".join(part for part in parts if part not in HOW)
        single = make_trainer(folder / "one", plain, processes=1)
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
    check_equal(tmp_path, engine, SLICE[engine])


@pytest.mark.slow
@pytest.mark.parametrize("engine", GRID)
def test_two_processes_equal_one_everywhere(engine: str, tmp_path: Path) -> None:
    check_equal(tmp_path, engine, GRID[engine])


# ---- Interruptions ----


@pytest.mark.slow
def test_zero3_goes_on_and_its_weights_go_elsewhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Under ZeRO-3 again, into `from_pretrained`, and into a training on one process."""
    case = "gpt2-full-replicated"
    on_two(tmp_path, "zero3", "engine_worker.py", "interrupt", case)
    whole, resumed = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "resumed")
    )
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    half, end = (tmp_path / f"{case}-out" / f"checkpoint-{n}" for n in (STEPS // 2, STEPS))
    assert len(list(half.glob("global_step*/*optim*"))) == 2  # in shards, so ZeRO was on
    loaded = GPT2LMHeadModel.from_pretrained(end).state_dict()
    torch.testing.assert_close({k: loaded[k] for k in whole}, whole, rtol=0, atol=0)
    single = make_trainer(tmp_path / "one", case, processes=1)
    single.train(str(half))
    assert "with a new optimizer" in caplog.text
    assert single.state.global_step == STEPS
    # SGD remembers nothing, so that a fresh one ends where the other would have.
    expected = {k: v for k, v in weights(single).items() if k in whole}
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights_too", [True, False])
def test_checkpoints_of_another_engine(weights_too: bool, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-5"
    (checkpoint / "global_step5").mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    single = make_trainer(tmp_path / "one", "gpt2-full-replicated", processes=1)
    if weights_too:
        (checkpoint / "global_step5").rmdir()
        single.is_deepspeed_enabled = True
    message = "was not written under DeepSpeed" if weights_too else "in DeepSpeed's shards only"
    with pytest.raises(InputError, match=message):
        single.train(str(checkpoint))


@pytest.mark.parametrize("engine", ["ddp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_job(engine: str, tmp_path: Path) -> None:
    """Within a minute, with a checkpoint that can be used."""
    words = ["for_long", "gpt2-full-replicated"]
    command = accelerate(tmp_path, engine, "engine_worker.py", *words)
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
    out = tmp_path / "gpt2-full-replicated-out"
    patience = time.monotonic() + 240
    while last_complete_checkpoint(out) is None:
        assert job.poll() is None, (tmp_path / "log").read_text()[-3000:]
        assert time.monotonic() < patience
        threading.Event().wait(0.2)
    os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
    killed = time.monotonic()
    assert job.wait(timeout=60) != 0
    assert time.monotonic() - killed < 60
    kept = last_complete_checkpoint(out)
    assert kept is not None
    assert GPT2LMHeadModel.from_pretrained(kept).num_parameters() > 0


def test_dispatched_batches_have_their_own_targets(tmp_path: Path) -> None:
    launch("dispatch_worker.py", str(tmp_path / "error.json"))
    assert json.loads((tmp_path / "error.json").read_text()) < 1e-5
