"""Models: loading, making them from scratch or from a teacher, output heads, vocabularies."""

from hf_distill.models.from_scratch import model_from_config, train_tokenizer
from hf_distill.models.from_teacher import student_and_report, student_from_teacher
from hf_distill.models.loading import load_model, load_tokenizer

__all__ = [
    "load_model",
    "load_tokenizer",
    "model_from_config",
    "student_and_report",
    "student_from_teacher",
    "train_tokenizer",
]
