"""Runs whose student is distilled on data rows first, and then on its own text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from run_setup import metrics, run, write_recipe
from safetensors.torch import load_file

import hf_distill
from hf_distill.recipes.stages import stage

OPTIONS = (
    "data.packing=false",
    "evaluate.written=3",
    "off_policy={max_steps: 4, learning_rate: 1e-2, logging_steps: 1}",
    "train={alpha: 0.9, on_policy: 0.5, max_new_tokens: 6, prompt_tokens: 8, keep_rows: true,"
    " max_steps: 4, learning_rate: 0.0, logging_steps: 1}",
)


def history(folder: Path, role: str) -> list[dict[str, Any]]:
    return json.loads((folder / role / "log_history.json").read_text())


@pytest.mark.parametrize(
    "more",
    [(), ("record={kind: full}", "baseline=false"), ("student.lora={r: 2}", "baseline=false")],
    ids=["plain", "recorded", "lora"],
)
def test_the_second_training_goes_on_from_the_first(more: tuple[str, ...], tmp_path: Path) -> None:
    done = run(write_recipe(tmp_path), *OPTIONS, *more)
    assert done.exit_code == 0, done.output
    folder = tmp_path / "runs" / "tiny"
    first, second = history(folder, "off_policy"), history(folder, "student")
    assert not any("written_tokens" in entry for entry in first)
    assert sum("written_tokens" in entry for entry in second) == 4
    (name,) = (path.name for path in (folder / "off_policy").glob("*.safetensors"))
    weights = [load_file(folder / role / name) for role in ("off_policy", "student")]
    for key, value in weights[0].items():  # the second learns at a rate of 0
        assert torch.equal(weights[1][key], value)
    found = metrics(folder)
    assert found["off_policy"]["kl_to_teacher"] == found["student"]["kl_to_teacher"]
    assert found["off_policy"]["kl_to_teacher"] != found["initial"]["kl_to_teacher"]
    assert found["off_policy"]["train_seconds"] > 0
    of_role = {
        role: {key: value for key, value in of.items() if key.startswith("written_")}
        for role, of in found.items()
        if role in ("teacher", "initial", "baseline", "off_policy", "student")
    }
    assert of_role.pop("initial") == {}
    assert of_role["off_policy"] == of_role["student"] != of_role["teacher"]
    assert of_role["teacher"]["written_reverse_kl"] == 0 < of_role["student"]["written_reverse_kl"]
    assert all(len(of) == 9 for of in of_role.values())
    for text in ("report.html", "student/README.md"):
        assert "ROUGE-L of drawn text" in (folder / text).read_text()
    kept = hf_distill.written_rows(folder / "student")
    assert set(kept["step"]) == {1, 2, 3, 4}
    assert all(kept["prompt"])
    if not more:  # nothing is written for the baseline
        assert not any("written_tokens" in entry for entry in history(folder, "baseline"))
    assert "off_policy" in (folder / "report.html").read_text()
    again = run(write_recipe(tmp_path), *OPTIONS, *more)
    assert "off_policy: unchanged, skipped" in again.output
    assert "train: unchanged, skipped" in again.output


def test_generated_rows_survive_an_interruption_after_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the end of the training and that of its stage."""
    recipe, whole = write_recipe(tmp_path), stage._finish
    options = (
        "data.packing=false",
        "baseline=false",
        "teacher.train={max_steps: 2}",
        "train={on_policy: 0.5, max_new_tokens: 6, keep_rows: true, max_steps: 4, save_steps: 2}",
    )

    def killed(run: Any, of: Any, *others: Any) -> None:
        if of.name == "train":
            raise KeyboardInterrupt
        whole(run, of, *others)

    monkeypatch.setattr(stage, "_finish", killed)
    assert run(recipe, *options).exit_code == 130
    monkeypatch.setattr(stage, "_finish", whole)
    done = run(recipe, *options)
    assert done.exit_code == 0, done.output
    assert "resuming from checkpoint-4" in done.output
    kept = hf_distill.written_rows(tmp_path / "runs" / "tiny" / "student")
    assert set(kept["step"]) >= {1, 2, 3, 4}
