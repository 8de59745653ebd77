"""The stages of a run: prepare, teacher, record, student, baseline, train, evaluate, report."""

from hf_distill.stages.chain import (
    STAGES,
    baseline,
    evaluate,
    measure_again,
    prepare,
    record,
    report,
    student,
    teacher,
    train,
)
from hf_distill.stages.engine import Run, Stage
from hf_distill.stages.folder import open_run

__all__ = [
    "STAGES",
    "Run",
    "Stage",
    "baseline",
    "evaluate",
    "measure_again",
    "open_run",
    "prepare",
    "record",
    "report",
    "student",
    "teacher",
    "train",
]
