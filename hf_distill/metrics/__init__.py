"""Quality of a model on held-out rows: sums by row, and the `evaluate` metrics made of them."""

from __future__ import annotations

from hf_distill.metrics.quality import (
    BitsPerByte,
    CalibrationError,
    Perplexity,
    RowMetric,
    TeacherAgreement,
)
from hf_distill.metrics.rows import BINS, row_sums, text_bytes

__all__ = [
    "BINS",
    "BitsPerByte",
    "CalibrationError",
    "Perplexity",
    "RowMetric",
    "TeacherAgreement",
    "row_sums",
    "text_bytes",
]
