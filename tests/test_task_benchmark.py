"""benchmarks/tasks.py: rows, going on after a cut, means, and the choice of rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from task_text import word_pieces
from transformers import BertConfig, BertModel, logging

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def identity(**changes: Any) -> dict[str, Any]:
    return {"task": "t", "model": "baseline", "seed": 0, "settings": {"layers": (0, 2)}} | changes


def encoder_in(folder: Path) -> Path:
    """A BERT of three layers with its tokenizer."""
    logging.set_verbosity_error()  # weights of the head are new
    word_pieces(model_max_length=128).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=23, num_hidden_layers=3, **sizes)).save_pretrained(folder)
    return folder


def test_a_row_is_measured_once_and_again_with_other_settings(tmp_path: Path) -> None:
    from task_results import Results

    measured: list[str] = []

    def work(name: str) -> dict[str, Any]:
        measured.append(name)
        return {"accuracy": 0.5, "macro_f1": 0.25}

    path = tmp_path / "new" / "rows.jsonl"
    first = Results(path).add(identity(), "accuracy", lambda: work("first"))
    assert first["value"] == 0.5
    with path.open("a") as file:
        file.write('{"task": "t", "model": "distilled", "se')  # what a kill leaves
    shown: list[dict[str, Any]] = []
    again = Results(path, shown.append)
    assert again.add(identity(), "accuracy", lambda: work("again")) == json.loads(json.dumps(first))
    for changes in ({"model": "distilled"}, {"seed": 1}, {"settings": {"layers": [0, 1]}}):
        again.add(identity(**changes), "accuracy", lambda: work("other"))
    assert measured == ["first", "other", "other", "other"]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["model"] for row in rows] == ["baseline", "distilled", "baseline", "baseline"]
    assert len(shown) == 4


def test_means_retention_and_gap_by_hand() -> None:
    from task_results import table

    found = {"teacher": [90.0], "baseline": [80.0, 82.0], "distilled": [85.0, 87.0, 86.0]}
    rows = [
        {"model": model, "metrics": {"f1": value}}
        for model, values in found.items()
        for value in values
    ]
    teacher, baseline, distilled = table(rows, ["bleu", "f1"])
    assert (teacher["mean"], teacher["sd"]) == (90, None)
    assert "retention" not in teacher
    assert baseline["sd"] == pytest.approx(2**0.5)
    assert "gap_closed" not in baseline
    assert distilled["mean"] == 86
    assert distilled["sd"] == pytest.approx(1)
    assert distilled["retention"] == pytest.approx(86 / 90)
    assert distilled["gap_closed"] == pytest.approx(5 / 9)


def test_few_rows_of_each_class_and_contexts_apart() -> None:
    from task_classification import few_of_each
    from task_questions import split

    labels = [n % 3 for n in range(30)]
    few = few_of_each(labels, 4, seed=1)
    assert sorted(labels[place] for place in few) == [0] * 4 + [1] * 4 + [2] * 4
    assert few == few_of_each(labels, 4, seed=1) != few_of_each(labels, 4, seed=2)
    rows = Dataset.from_list([{"context": f"c{n % 8}", "row": n} for n in range(24)])
    kept, held_out = split(rows, 0.25)
    assert len(held_out) == 6
    assert not set(kept["context"]) & set(held_out["context"])
    assert sorted([*kept["row"], *held_out["row"]]) == list(range(24))


def test_a_run_that_was_cut_trains_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import task_classification
    from task_results import Results
    from task_training import Place

    encoder, data = encoder_in(tmp_path / "encoder"), tmp_path / "rows.json"
    words = ("cat", "dog")
    rows = [{"text": f"the {words[n % 2]} sat .", "label": words[n % 2]} for n in range(24)]
    data.write_text("\n".join(map(json.dumps, rows)))
    plan = replace(
        task_classification.BANKING77, train=data.name, valid=data.name, teacher_epochs=1,
        epochs=1, batch_size=8, num_layers=2, labels_per_class=3, initial="encoder",
    )  # fmt: skip
    trained: list[tuple[int, float]] = []
    whole = task_classification.train

    def counted(*args: Any, **kwargs: Any) -> Any:
        trained.append((len(args[1]), kwargs.get("alpha", 0.0)))
        return whole(*args, **kwargs)

    monkeypatch.setattr(task_classification, "train", counted)
    place = Place(tmp_path, tmp_path / "work", encoder)

    def run(seeds: list[int]) -> list[dict[str, Any]]:
        results = Results(tmp_path / "rows.jsonl")
        task_classification.Task("few", plan, place).run(results, seeds)
        return results.rows

    first = run([0])
    # The teacher learns from all rows, the baseline from the labelled ones, the student from all.
    assert trained == [(24, 0.0), (6, 0.0), (24, 0.9)]
    assert [row["model"] for row in first] == ["teacher", "baseline", "distilled"]
    for row in first:
        assert {*row} > {"task", "model", "seed", "metric", "value", "metrics", "settings"}
        assert row["value"] == row["metrics"]["accuracy"]
    both = run([0, 1])
    assert trained[3:] == [(6, 0.0), (24, 0.9)]
    assert both[:3] == first
    assert [row["seed"] for row in both] == [0, 0, 0, 1, 1]


def test_texts_are_learnt_from_tokens_from_sequences_and_from_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import task_texts
    from task_results import Results
    from task_training import Place

    rows = [{"translation": {"en": f"the cat {n % 4}", "es": f"el gato {n % 4}"}} for n in range(8)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    plan = replace(
        task_texts.PLANS["translation"], train=("rows.json",), valid=("rows.json",),
        config=task_texts.transformer(96, (2, 2), 16), max_source_length=16, max_target_length=8,
        vocab_size=262, teacher_epochs=1, epochs=1, batch_size=4,
    )  # fmt: skip
    targets: list[tuple[bool, Any]] = []
    whole = task_texts.train

    def seen(model: Any, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        targets.append((kwargs.get("teacher") is not None, tokens["labels"]))
        return whole(model, tokens, *args, **kwargs)

    monkeypatch.setattr(task_texts, "train", seen)
    place, results = Place(tmp_path, tmp_path / "work"), Results(tmp_path / "rows.jsonl")
    task = task_texts.Task("texts", plan, place)
    task.run(results, [0])
    models = ["teacher", "baseline", "token", "sequence", "token+sequence"]
    assert [row["model"] for row in results.rows] == models
    assert all(row["value"] == row["metrics"]["bleu"] for row in results.rows)
    true, written = targets[0][1], targets[3][1]
    assert true != written  # what the teacher wrote after two steps
    expected = [(False, true), (False, true), (True, true), (False, written), (True, written)]
    assert targets == expected


def test_questions_have_a_live_teacher(tmp_path: Path) -> None:
    import task_questions
    from task_results import Results
    from task_training import Place

    rows = [
        {
            "question": "who sat ?",
            "context": f"the {'red ' * (n % 4)}cat sat on the mat .",
            "answers": {"text": ["cat"], "answer_start": [4 + 4 * (n % 4)]},
        }
        for n in range(12)
    ]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    plan = task_questions.Plan(
        files=("rows.json",), teacher_epochs=1, epochs=1, num_layers=2, max_length=32, stride=8
    )
    place = Place(tmp_path, tmp_path / "work", encoder_in(tmp_path / "encoder"))
    results = Results(tmp_path / "rows.jsonl")
    task_questions.Task("questions", plan, place).run(results, [3])
    assert [(row["model"], row["seed"]) for row in results.rows] == [
        ("teacher", 0), ("baseline", 3), ("distilled", 3),
    ]  # fmt: skip
    assert all(row["value"] == row["metrics"]["f1"] for row in results.rows)
