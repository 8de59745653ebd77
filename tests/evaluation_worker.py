"""`evaluate_student` on several processes: `evaluation_worker.py OUT` writes a file a process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from distributed import leave
from evaluation_setup import PROMPTED, ROWS, collate, pair, tokenizer

from hf_distill.errors import InputError
from hf_distill.evaluation import performance as measure
from hf_distill.evaluation.evaluate import evaluate_models, evaluate_student
from hf_distill.evaluation.own_text import evaluate_written
from hf_distill.teachers import LiveTeacher


def diverged() -> None:
    raise InputError("measured")


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    student, teacher = pair()
    figures: dict[Any, Any] = {}
    for rows in (13, 3):  # 13 = 4 + 4 + 4 + 1, and fewer rows than one round of batches
        figures[rows] = evaluate_student(
            student,
            teacher,
            ROWS[:rows],
            tokenizer(),
            batch_size=4,
            data_collator=collate,
            accelerator=accelerator,
            speed=rows == 3,
        )
    quality, _ = evaluate_models(
        {"teacher": teacher, "student": student},
        LiveTeacher(teacher, tokenizer()),
        {"whole": ROWS, "part": ROWS[:5]},
        tokenizer(),
        batch_size=4,
        data_collator=collate,
        accelerator=accelerator,
        speed=False,
    )
    figures["sets"] = quality
    for rows in (13, 3):
        written = evaluate_written(
            student, teacher, PROMPTED[:rows], tokenizer(), batch_size=4, accelerator=accelerator
        )
        assert written.predictions is not None
        figures[f"written {rows}"] = [written, written.predictions.texts]
    # What fails on the main process alone reaches all of them.
    measure.costs = lambda models, writes: diverged()  # type: ignore[assignment]
    try:
        evaluate_student(student, teacher, ROWS[:3], tokenizer(), data_collator=collate)
    except InputError as error:
        figures["error"] = str(error)
    Path(f"{sys.argv[1]}.{accelerator.process_index}").write_text(json.dumps(figures))
    leave()
