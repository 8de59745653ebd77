"""The README's Python blocks run as they stand; its commands name files and options that exist."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from run_setup import ROOT, run, write_recipe
from typer.testing import CliRunner

from hf_distill.cli.commands import app
from hf_distill.recipes import load_recipe

TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def test_python_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other in one namespace, beside the run folder of a small run."""
    done = run(write_recipe(tmp_path), "name=quickstart", "train.max_steps=2", "baseline=false")
    assert done.exit_code == 0, done.output
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    monkeypatch.chdir(tmp_path)
    found = blocks("python")
    assert len(found) == 3
    namespace: dict[str, object] = {}
    for block in found:
        exec(compile(block, "README.md", "exec"), namespace)
    assert (tmp_path / "recordings" / "train" / "recording.json").exists()


def test_commands() -> None:
    commands = [
        shlex.split(line, comments=True)
        for block in blocks("bash")
        for line in block.splitlines()
        if line.startswith(("hf-distill", "accelerate"))
    ]
    assert len(commands) > 5
    for words in commands:
        for word in words:
            if word.startswith("recipes/"):
                assert (ROOT / word).exists(), word
        if words[0] == "hf-distill":
            shown = CliRunner().invoke(app, [words[1], "--help"]).output
            assert all(word in shown for word in words if word.startswith("--"))
        if words[:2] == ["hf-distill", "run"]:
            pairs = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
            assert load_recipe(ROOT / words[2], pairs)


def test_links() -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / link).exists(), link
