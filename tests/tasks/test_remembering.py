"""A teacher that is asked once for each batch gives the figures of one that is asked always."""

from __future__ import annotations

from typing import Any

import pytest
from task_evaluation import KINDS, pair, rows
from task_text import word_pieces
from writing_setup import tokenizer as byte_level

from hf_distill import evaluate_student
from hf_distill.teachers import LiveTeacher, RememberingTeacher


class Counting(LiveTeacher):
    """Counts the batches on which the model runs."""

    asked = 0

    def signal(self, *args: Any) -> Any:
        self.asked += 1
        return super().signal(*args)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("answers", "texts")])
def test_the_teacher_runs_once_for_all_students(kind: str) -> None:
    student, model = pair(kind)
    tokenizer = byte_level() if kind == "seq2seq-lm" else word_pieces()
    teacher = Counting(model, tokenizer)
    remembering = RememberingTeacher(teacher)

    def figures(of: Any, beside: Any, number: int = 13) -> dict[str, float]:
        return evaluate_student(of, beside, rows(kind, number), tokenizer, speed=False)

    expected = [figures(one, Counting(model, tokenizer)) for one in (student, model)]
    assert figures(student, remembering) == expected[0]
    assert teacher.asked == 2
    # Another student, here the teacher itself, on the same rows, then other rows.
    assert figures(model, remembering) == pytest.approx(expected[1], abs=1e-6)
    assert teacher.asked == 2
    figures(student, remembering, 5)
    assert teacher.asked == 3


def test_nothing_is_kept_beyond_the_limit() -> None:
    student, model = pair("masked-lm")
    teacher = Counting(model, word_pieces())
    remembering = RememberingTeacher(teacher, most_bytes=1)
    for _ in range(2):
        evaluate_student(student, remembering, rows("masked-lm"), word_pieces(), speed=False)
    assert teacher.asked == 4
