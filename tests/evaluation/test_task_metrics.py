"""Metrics of classes, numbers and answers, against figures worked out by hand and by loops."""

from __future__ import annotations

import random
from fractions import Fraction
from typing import Any

import pytest

from hf_distill import InputError
from hf_distill.evaluation import (
    Classification,
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
