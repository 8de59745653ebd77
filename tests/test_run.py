"""A whole run on the command line: small, but every stage is real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
QUALITY = ("perplexity", "bits_per_byte", "kl_to_teacher", "top1_agreement", "calibration_error")

RECIPE = """
seed: 0
data: {train: "{stdlib}/email/*.py", rows: document, max_length: 64, eval_fraction: 0.2}
tokenizer: {vocab_size: 400}
teacher:
  config: {model_type: gpt2, n_layer: 2, n_embd: 32, n_head: 2, n_positions: 64}
  train: {max_steps: 12, learning_rate: 3e-3, save_steps: 3}
student:
  config: {model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 2, n_positions: 64}
train: {alpha: 0.9, max_steps: 12, learning_rate: 3e-3, save_steps: 3}
evaluate: {prompts: 2, max_new_tokens: 8, speed: false}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def command(recipe: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "hf_distill.cli", "run", str(recipe), *options]


def environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(
    recipe: Path, *options: str, launcher: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    words = command(recipe, *options)
    if launcher is not None:
        words = [*launcher, str(ROOT / "recipes" / "distill.py"), *words[4:]]
    return subprocess.run(
        words, cwd=recipe.parent, env=environment(), capture_output=True, text=True, timeout=300
    )


def quality(recipe: Path, name: str = "tiny") -> dict[str, dict[str, float]]:
    metrics = json.loads((recipe.parent / "runs" / name / "metrics.json").read_text())
    return {role: {k: metrics[role][k] for k in QUALITY} for role in metrics if role in ROLES}


ROLES = ("teacher", "initial", "baseline", "student")


def test_run_then_skip_then_redo_only_what_a_change_touches(recipe: Path) -> None:
    done = run(recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = recipe.parent / "runs" / "tiny"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["teacher"]["kl_to_teacher"] == 0
    assert metrics["teacher"]["top1_agreement"] == 1
    assert metrics["student"]["parameters"] < metrics["teacher"]["parameters"]
    assert metrics["baseline"]["train_seconds"] > 0
    assert len(metrics["continuations"]) == 2
    assert "<html" in (folder / "report.html").read_text()
    assert not list(folder.rglob("training_args.bin"))

    again = run(recipe)
    lines = [line for line in again.stdout.splitlines() if line]
    assert len(lines) == 7
    assert all(line.endswith("unchanged, skipped") for line in lines)

    changed = run(recipe, "--set", "train.alpha=0.5")
    assert "teacher: unchanged" in changed.stdout
    assert "student: unchanged" in changed.stdout
    assert "train: done" in changed.stdout
    assert "evaluate: done" in changed.stdout


def test_a_killed_run_ends_with_the_metrics_of_an_uninterrupted_one(recipe: Path) -> None:
    whole = run(recipe, "--set", "name=whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    # Killed when a stage has begun and, in the trainings, a checkpoint may be half-written.
    for moment in ("work/prepare", "work/teacher/checkpoints", "work/train/checkpoints"):
        started = subprocess.Popen(
            command(recipe),
            cwd=recipe.parent,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _wait_for(recipe.parent / "runs" / "tiny" / moment, started)
        started.send_signal(signal.SIGKILL)
        started.wait()
        assert not (recipe.parent / "runs" / "tiny" / "metrics.json").exists()
    assert run(recipe).returncode == 0
    assert quality(recipe) == quality(recipe, "whole")


def _wait_for(path: Path, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, f"ended before {path} appeared"
        assert time.monotonic() < deadline
        time.sleep(0.01)


LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


def test_two_processes(recipe: Path) -> None:
    launcher = [*LAUNCH, "--cpu", "--num_processes", "2", "--num_machines", "1"]
    done = run(recipe, launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("evaluate: done") == 1
    assert quality(recipe)["student"]["perplexity"] > 1


def test_lora_student(recipe: Path) -> None:
    done = run(recipe, "--set", "student.lora.r=2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (recipe.parent / "runs/tiny/student/adapter_model.safetensors").exists()
    found = quality(recipe)
    assert found["student"]["kl_to_teacher"] < found["initial"]["kl_to_teacher"]


BAD = {
    "train.alpah=0.5": "unknown key 'train.alpah'; did you mean 'train.alpha'?",
    "train.alpha=1.5": "alpha is 1.5, but must be between 0 and 1",
    "train.alpha='0.5'": "train.alpha is '0.5', but must be",
    "train.temperature=0": "temperature is 0",
    "train.beta=1.0": "beta is 1.0",
    "data.train=nothing/*.txt": "nothing/*.txt",
    "data.max_length=128": "positions",
    "teacher={model: no/such-model}": "",
    "train.per_device_train_batch_size=100000": "too small",
}


@pytest.mark.parametrize("change", BAD)
def test_bad_input_is_one_line_and_code_2(change: str, recipe: Path) -> None:
    done = run(recipe, "--set", change)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr[-2000:]
    assert len(errors) == 1
    assert BAD[change] in errors[0]
    assert "Traceback" not in done.stderr
    folder = recipe.parent / "runs" / "tiny"
    assert not (folder / "student").exists()
    assert not (folder / "metrics.json").exists()


def test_a_folder_of_something_else_is_left_alone(recipe: Path) -> None:
    folder = recipe.parent / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("precious")
    done = run(recipe)
    assert done.returncode == 2
    assert "is no run folder" in done.stderr
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_shipped_recipes_are_valid() -> None:
    from hf_distill.recipe import dump_recipe, load_recipe, parse_recipe

    paths = sorted((ROOT / "recipes").glob("*.yaml"))
    assert paths
    for path in paths:
        text = dump_recipe(load_recipe(path))
        assert dump_recipe(parse_recipe(text)) == text
