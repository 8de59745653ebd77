"""Runs of a tiny recipe, in this process or in one that can be killed."""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from hf_distill.cli.commands import app

ROOT = Path(__file__).parents[1]
ROLES = ("teacher", "initial", "baseline", "student")
QUALITY = ("perplexity", "bits_per_byte", "kl_to_teacher", "top1_agreement", "calibration_error")

RECIPE = """
seed: 0
data: {{train: {text}/*.txt, rows: document, max_length: 32, eval_fraction: 0.2}}
tokenizer: {{vocab_size: 300}}
teacher:
  config: {{model_type: gpt2, n_layer: 2, n_embd: 32, n_head: 2, n_positions: 32}}
  train: {{max_steps: 12, learning_rate: 1e-2, save_steps: 3}}
student:
  config: {{model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 2, n_positions: 32}}
train: {{alpha: 0.9, max_steps: 12, learning_rate: 1e-2, save_steps: 3}}
evaluate: {{prompts: 2, max_new_tokens: 4, speed: false}}
"""


def write_text(folder: Path) -> None:
    """Forty small files in which some words always follow others."""
    folder.mkdir()
    names = ("rose", "iris", "ivy", "fern", "moss")
    for i in range(40):
        words = [
            f"{names[(i * k) % 5]} grows by the {names[(i + k) % 5]} in year {i * k}"
            for k in range(9)
        ]
        (folder / f"{i:02}.txt").write_text(".\n".join(words) + f".\nThe end of part {i}.\n")


def write_recipe(folder: Path, name: str = "tiny") -> Path:
    """The tiny recipe, with its text beside it."""
    if not (folder / "text").exists():
        write_text(folder / "text")
    path = folder / f"{name}.yaml"
    path.write_text(RECIPE.format(text=folder / "text"))
    return path


def invoke(*words: str | Path) -> Result:
    """`hf-distill words` in this process."""
    # Stages collect garbage often; without this each time looks at every imported module.
    gc.freeze()
    try:
        return CliRunner().invoke(app, [str(word) for word in words])
    finally:
        gc.unfreeze()


def run(recipe: Path, *overrides: str) -> Result:
    """`hf-distill run`, its run folder beside the recipe; later overrides are the caller's."""
    options = [f"output_dir={recipe.parent / 'runs'}", *overrides]
    return invoke("run", recipe, *(word for option in options for word in ("--set", option)))


def _in_child(words: Sequence[str], log: Path) -> None:
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        app(list(words), prog_name="hf-distill")


def start(recipe: Path, *overrides: str) -> BaseProcess:
    """The same in a process of its own, forked where everything is imported already."""
    options = [f"output_dir={recipe.parent / 'runs'}", *overrides]
    words = ["run", str(recipe), *(word for option in options for word in ("--set", option))]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_distill.cli.commands", "hf_distill.recipes.stages"])
    process = context.Process(target=_in_child, args=(words, recipe.with_suffix(".log")))
    process.start()
    return process


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def quality(folder: Path) -> dict[str, dict[str, float]]:
    """What must not depend on interruptions, of every model."""
    found = metrics(folder)
    return {role: {k: found[role][k] for k in QUALITY} for role in ROLES if role in found}


def environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def launch(
    recipe: Path, config: str, *overrides: str, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`recipes/distill.py` under `accelerate launch`, in the folder of the recipe."""
    words = [sys.executable, "-m", "accelerate.commands.launch"]
    words += ["--config_file", str(ROOT / "recipes" / "accelerate" / config)]
    words += ["--main_process_port", "0", str(ROOT / "recipes" / "distill.py"), str(recipe)]
    words += [word for override in overrides for word in ("--set", override)]
    return subprocess.run(
        words,
        cwd=cwd or recipe.parent,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )
