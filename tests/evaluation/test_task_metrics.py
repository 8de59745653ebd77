"""Metrics of classes, numbers and answers, against figures worked out by hand and by loops."""

from __future__ import annotations

import random
import re
from fractions import Fraction
from typing import Any

import pytest

from hf_distill import InputError
from hf_distill.evaluation import (
    Classification,
    Entities,
    MultiLabelClassification,
    QuestionAnswering,
    Regression,
    TokenClassification,
)


def f1_by_loops(said: list[Any], true: list[Any], wanted: Any) -> Fraction:
    """F1 of one class from precision and recall; 0 where neither names it."""
    right = sum(a == b == wanted for a, b in zip(said, true, strict=True))
    if not right:
        return Fraction(0)
    precision, recall = Fraction(right, said.count(wanted)), Fraction(right, true.count(wanted))
    return 2 * precision * recall / (precision + recall)


def test_classification_by_loops() -> None:
    draw = random.Random(0)
    said = [draw.choice([0, 1, 2, 5]) for _ in range(60)]
    true = [draw.choice([0, 1, 3, 5]) for _ in range(60)]
    found = Classification().compute(predictions=said, references=true)
    right = sum(a == b for a, b in zip(said, true, strict=True))
    scores = [f1_by_loops(said, true, index) for index in (0, 1, 2, 3, 5)]
    assert found == pytest.approx(
        {"accuracy": right / 60, "macro_f1": float(sum(scores) / len(scores))}
    )


def test_rows_and_tokens_without_a_label_are_left_out() -> None:
    kept = Classification().compute(predictions=[0, 1, 1], references=[0, 1, 0])
    rows = Classification().compute(predictions=[0, 1, 1, 7], references=[0, 1, 0, -100])
    tokens = TokenClassification().compute(
        predictions=[[0, 9, 1], [], [1]], references=[[0, -100, 1], [], [0]]
    )
    assert kept == rows == tokens
    assert kept == pytest.approx({"accuracy": 2 / 3, "macro_f1": 2 / 3})


def test_several_labels_by_hand() -> None:
    found = MultiLabelClassification().compute(
        predictions=[[1, 0, 1], [1, 1, 0], [0, 0, 0]], references=[[1, 0, 0], [1, 1, 0], [1, 0, 0]]
    )
    # F1 of the labels: 2 * 2 / (2 + 3), 1, and 0 for the one that is only predicted.
    assert found == pytest.approx(
        {"accuracy": 1 / 3, "macro_f1": (0.8 + 1 + 0) / 3, "micro_f1": 2 * 3 / (4 + 4)}
    )


def test_correlations_by_hand() -> None:
    said, true = [1.0, 2.0, 4.0], [1.0, 3.0, 2.0]
    found = Regression().compute(predictions=said, references=true)
    # Deviations -4/3, -1/3, 5/3 and -1, 1, 0; ranks 1, 2, 3 and 1, 3, 2.
    assert found["pearson"] == pytest.approx(1 / (42 / 9 * 2) ** 0.5)
    assert found["spearman"] == pytest.approx(0.5)
    assert found["mse"] == pytest.approx((0 + 1 + 4) / 3)
    assert Regression().compute(predictions=[1.0, 1.0], references=[0.0, 2.0]) == {"mse": 1.0}


@pytest.mark.parametrize(
    ("said", "accepted", "exact", "f1"),
    [
        ("The Cat, sat.", ["cat sat"], 100, 100),
        ("the  cat", ["a cat!", "dog"], 100, 100),
        ("black cat", ["the cat"], 0, 100 * 2 / 3),
        ("cat cat", ["cat dog"], 0, 50),
        ("dog", ["cat", "big dog"], 0, 100 * 2 / 3),
        ("", ["cat"], 0, 0),
        ("cat", [], 0, 0),
        ("", [], 100, 100),
        ("", ["the"], 100, 100),  # SQuAD 2.0 drops an answer of articles alone
        ("theatre", ["a theatre"], 100, 100),
    ],
)
def test_answers_as_squad_counts_them(
    said: str, accepted: list[str], exact: float, f1: float
) -> None:
    found = QuestionAnswering().compute(predictions=[said], references=[accepted])
    assert found["exact_match"] == exact
    assert found["f1"] == pytest.approx(f1)


def test_answerable_and_unanswerable_rows_apart() -> None:
    found = QuestionAnswering().compute(
        predictions=["black cat", "", "something", "dog"], references=[["cat"], [], [], ["dog"]]
    )
    assert found == pytest.approx(
        {
            "exact_match": 50,
            "f1": 100 * (2 / 3 + 1 + 0 + 1) / 4,
            "has_answer_exact_match": 50,
            "has_answer_f1": 100 * (2 / 3 + 1) / 2,
            "no_answer_accuracy": 50,
        }
    )


@pytest.mark.parametrize(
    ("metric", "predictions", "references", "message"),
    [
        (Classification, [], [], "no predictions"),
        (Classification, [1], [-100], "every reference is -100"),
        (TokenClassification, [[1, 2]], [[1]], "row 0 has 2 predicted tags and 1 true"),
        (MultiLabelClassification, [[1, 0]], [[1]], r"rows have \[1, 2\] labels"),
        (MultiLabelClassification, [[1, 2]], [[1, 0]], "0 or 1"),
        (Regression, [float("nan")], [0.0], "the prediction of row 0 is nan"),
        (QuestionAnswering, ["a"], [], "1 predictions and 0 references"),
    ],
)
def test_bad_rows_are_one_clear_line(
    metric: Any, predictions: Any, references: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        metric().compute(predictions=predictions, references=references)
    assert "\n" not in str(caught.value)


# ---- Entities ----


def entities_by_regex(tags: list[str]) -> set[tuple[str, int, int]]:
    """Kind, first and last place, from the row as a text of one letter a token."""
    found = set()
    for kind in ("PER", "LOC"):
        marks = {f"B-{kind}": "b", f"I-{kind}": "i"}
        text = "".join(marks.get(tag, "o") for tag in tags)
        found |= {(kind, m.start(), m.end() - 1) for m in re.finditer("bi*|i+", text)}
    return found


def test_entities_by_regex() -> None:
    draw = random.Random(1)
    names = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    said, true = ([draw.choices(names, k=draw.randint(0, 9)) for _ in range(60)] for _ in range(2))
    said = [(row + ["O"] * 9)[: len(wanted)] for row, wanted in zip(said, true, strict=True)]
    pairs = [(entities_by_regex(a), entities_by_regex(b)) for a, b in zip(said, true, strict=True)]
    right = sum(len(a & b) for a, b in pairs)
    ours, theirs = (sum(len(pair[side]) for pair in pairs) for side in (0, 1))
    assert right > 5
    assert Entities().compute(predictions=said, references=true) == pytest.approx(
        {
            "entity_precision": right / ours,
            "entity_recall": right / theirs,
            "entity_f1": 2 / (ours / right + theirs / right),
        }
    )


def test_entities_by_hand() -> None:
    true = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "I-LOC"]]

    def found(*said: list[str]) -> float:
        return Entities().compute(predictions=list(said), references=true)["entity_f1"]

    assert found(*true) == 1
    # One token less is another entity; an I after another kind begins one.
    assert found(["B-PER", "O", "O", "B-LOC"], ["O", "O"]) == pytest.approx(2 / 5)
    assert found(["B-LOC", "I-PER", "O", "I-LOC"], ["O", "B-LOC"]) == pytest.approx(4 / 7)
    assert found(["B-PER", "B-PER", "O", "O"], ["O", "O"]) == 0
    assert found(["O"] * 4, ["O"] * 2) == 0
    with pytest.raises(InputError, match="row 1 has 1 predicted tags and 2 true ones"):
        found(true[0], ["O"])
