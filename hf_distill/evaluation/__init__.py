"""Evaluation: a student beside its teacher, in quality, size, speed and memory."""

from hf_distill.evaluation.evaluate import continuations, evaluate_student
from hf_distill.evaluation.metrics import (
    BitsPerByte,
    CalibrationError,
    Perplexity,
    RowMetric,
    TeacherAgreement,
)
from hf_distill.evaluation.row_sums import BINS, row_sums, text_bytes

__all__ = [
    "BINS",
    "BitsPerByte",
    "CalibrationError",
    "Perplexity",
    "RowMetric",
    "TeacherAgreement",
    "continuations",
    "evaluate_student",
    "row_sums",
    "text_bytes",
]
