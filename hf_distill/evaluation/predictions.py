"""The predictions of a model as text, and the choice of rows to show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Predictions:
    """The predictions of a model for some rows, with the references.

    texts, references: of each row, as text
    scores: of each row, 1 for a right prediction, less for others; NaN without a reference
    """

    texts: list[str]
    references: list[str]
    scores: list[float]


def chosen_rows(scores: Sequence[float], number: int) -> list[int]:
    """Indices of some rows, half of them wrong where there are as many, the worst first.

    scores: see `Predictions`; rows without a reference are never chosen
    """
    wrong = [row for row, score in enumerate(scores) if score < 1]
    right = [row for row, score in enumerate(scores) if score >= 1]
    of_right = min(len(right), max(number // 2, number - len(wrong)))
    rows = _spread(wrong, number - of_right) + _spread(right, of_right)
    return sorted(rows, key=lambda row: (scores[row], row))


def _spread(rows: list[int], number: int) -> list[int]:
    """Some of the rows, evenly over them."""
    number = min(number, len(rows))
    return [rows[i * len(rows) // number] for i in range(number)]
