"""Answers in windows, against every span and against scores that are easy to add up."""

from __future__ import annotations

import math

import pytest
import torch

from hf_distill.evaluation.spans import answers, best_spans


@pytest.mark.parametrize("longest", [1, 3, 30])
def test_every_span_is_looked_at(longest: int) -> None:
    logits = torch.randn(5, 2, 12)
    allowed = torch.rand(5, 12) < 0.7
    allowed[4] = False
    found = best_spans(logits, allowed, torch.tensor([0, 3, 0, 0, 2]), longest)
    for row in range(5):
        best = (-math.inf, -1, -1)
        for start in range(12):
            for end in range(start, min(start + longest, 12)):
                if allowed[row, start] and allowed[row, end]:
                    score = logits[row, 0, start].item() + logits[row, 1, end].item()
                    best = max(best, (score, start, end))
        assert found["span_score"][row].item() == pytest.approx(best[0])
        assert (int(found["start"][row]), int(found["end"][row])) == best[1:]
    expected = logits[torch.arange(5), :, [0, 3, 0, 0, 2]].sum(1)
    torch.testing.assert_close(found["no_answer_score"].float(), expected)


CONTEXTS = ["ab cd ef", "gh ij"]
OFFSETS = [[[-1, -1], [0, 2], [3, 5]], [[-1, -1], [3, 5], [6, 8]], [[-1, -1], [0, 2], [3, 5]]]
SCORES = {"start": [1, 2, 1], "end": [2, 2, 1], "span_score": [4.0, 5.0, 1.0]}


def found(no_answer: list[float], *, may_be_none: bool = True) -> list[str]:
    """Answers from two windows of the first question and one of the second."""
    scores = {**SCORES, "no_answer_score": no_answer}
    return answers(
        scores, [0, 0, 1], lambda window: OFFSETS[window], CONTEXTS, may_be_none=may_be_none
    )


def test_the_best_window_answers() -> None:
    assert found([0.0, 0.0, 0.0]) == ["ef", "gh"]


def test_no_answer_has_to_be_likelier_in_every_window() -> None:
    assert found([9.0, 4.9, 1.1]) == ["ef", ""]
    assert found([5.1, 9.0, 1.0]) == ["", "gh"]
    assert found([9.0, 9.0, 9.0], may_be_none=False) == ["ef", "gh"]


def test_windows_without_a_place_for_an_answer() -> None:
    scores = {"start": [-1], "end": [-1], "span_score": [-math.inf], "no_answer_score": [0.0]}
    assert answers(scores, [0], lambda window: [], ["ab"], may_be_none=False) == [""]
