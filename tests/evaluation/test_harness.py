"""Benchmarks of lm-evaluation-harness: a local task, against scores by hand; what is missing."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from run_setup import metrics, run, write_recipe

from hf_distill.errors import InputError
from hf_distill.evaluation.harness import check_harness, harness_scores

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: " "
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
NAMES = ("fox", "dog", "wife", "row", "man", "second", "good", "lazy", "brown")
ROWS = [
    {
        "question": f"The {name} is in the",
        "choices": [NAMES[n - 1], f"{NAMES[n - 2]} or {name}", NAMES[n - 4]],
        "gold": n % 3,
    }
    for n, name in enumerate(NAMES)
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the task `plants`."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "plants.yaml").write_text(TASK.format(name="plants", rows=rows))
    return folder


@torch.no_grad()
def by_hand(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Accuracy and its standard error: the choice with the largest sum of log-probabilities."""
    right = []
    for row in rows:
        sums = []
        for choice in row["choices"]:
            start = len(tokenizer(row["question"])["input_ids"])
            ids = tokenizer(f"{row['question']} {choice}")["input_ids"]
            log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            sums.append(sum(log_probs[p - 1, ids[p]].item() for p in range(start, len(ids))))
        right.append(float(max(range(3), key=sums.__getitem__) == row["gold"]))
    mean = sum(right) / len(right)
    variance = sum((one - mean) ** 2 for one in right) / (len(right) - 1)
    return mean, math.sqrt(variance / len(right))


@pytest.mark.parametrize("limit", [None, 7])
def test_scores_of_a_local_task(
    folder: Path, limit: int | None, tiny_gpt2: Any, tiny_tokenizer: Any
) -> None:
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    model = tiny_gpt2(initializer_range=0.3)
    check_harness(["plants"], str(folder))
    found = harness_scores(
        model, tiny_tokenizer, ["plants"], include_path=str(folder), limit=limit, batch_size=4
    )
    value, stderr = by_hand(model, tiny_tokenizer, ROWS[:limit])
    assert 0 < value < 1
    assert found["plants"]["acc"] == pytest.approx({"value": value, "stderr": stderr}, rel=1e-6)


def test_a_recipe_with_a_benchmark(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    harness = f"evaluate.harness={{tasks: [plants], include_path: {folder}, limit: 6}}"
    (tmp_path / "run").mkdir()
    recipe = write_recipe(tmp_path / "run")
    done = run(recipe, harness, "train.max_steps=2", "teacher.train.max_steps=2")
    assert done.exit_code == 0, done.output
    made = recipe.parent / "runs" / "tiny"
    found = metrics(made)["harness"]
    assert found["version"]
    assert list(found["tasks"]["plants"]["acc"]) == ["teacher", "baseline", "student"]
    assert all({"value", "stderr"} == set(s) for s in found["tasks"]["plants"]["acc"].values())
    assert "<h2>Benchmarks</h2>" in (made / "report.html").read_text()
    assert "| plants | acc |" in (made / "student" / "README.md").read_text()


def test_what_is_missing_is_told_before_anything_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("lm_eval") is not None:
        with pytest.raises(InputError, match="is not a folder"):
            check_harness(["plants"], str(folder / "other"))
        (folder / "rows.jsonl").unlink()
        with pytest.raises(InputError, match="cannot run plants .* whether its rows are on this"):
            check_harness(["plants"], str(folder))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'hf-distill\[eval\]'"):
        check_harness(["plants"], str(folder))
