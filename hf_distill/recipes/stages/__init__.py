"""The stages of a run.

prepare, teacher, annotate, record, student, baseline, off_policy, train, evaluate, report
"""

from hf_distill.recipes.stages.order import (
    STAGES,
    annotate,
    baseline,
    evaluate,
    measure_again,
    off_policy,
    prepare,
    record,
    report,
    student,
    teacher,
    train,
)
from hf_distill.recipes.stages.run_folder import open_run
from hf_distill.recipes.stages.stage import Run, Stage

__all__ = [
    "STAGES",
    "Run",
    "Stage",
    "annotate",
    "baseline",
    "evaluate",
    "measure_again",
    "off_policy",
    "open_run",
    "prepare",
    "record",
    "report",
    "student",
    "teacher",
    "train",
]
