"""Evaluation: a student beside its teacher, in quality, size, speed and memory."""

from hf_distill.evaluation.continuations import continuations
from hf_distill.evaluation.evaluate import evaluate_models, evaluate_student
from hf_distill.evaluation.examples import examples
from hf_distill.evaluation.generation_metrics import Bleu, ChrF, Rouge
from hf_distill.evaluation.metrics import (
    BitsPerByte,
    CalibrationError,
    Perplexity,
    RowMetric,
    TeacherAgreement,
)
from hf_distill.evaluation.own_text import evaluate_written
from hf_distill.evaluation.predictions import Predictions
from hf_distill.evaluation.row_sums import BINS, row_sums, text_bytes
from hf_distill.evaluation.task_measures import Evaluation
from hf_distill.evaluation.task_metrics import (
    Classification,
    Entities,
    MultiLabelClassification,
    QuestionAnswering,
    Regression,
    TokenClassification,
)

__all__ = [
    "BINS",
    "BitsPerByte",
    "Bleu",
    "CalibrationError",
    "ChrF",
    "Classification",
    "Entities",
    "Evaluation",
    "MultiLabelClassification",
    "Perplexity",
    "Predictions",
    "QuestionAnswering",
    "Regression",
    "Rouge",
    "RowMetric",
    "TeacherAgreement",
    "TokenClassification",
    "continuations",
    "evaluate_models",
    "evaluate_student",
    "evaluate_written",
    "examples",
    "row_sums",
    "text_bytes",
]
