"""Knowledge distillation as a Hugging Face Trainer."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_distill.errors import InputError
    from hf_distill.evaluation.evaluate import evaluate_student
    from hf_distill.evaluation.own_text import evaluate_written
    from hf_distill.losses.objective import Term
    from hf_distill.models.from_teacher import student_from_teacher
    from hf_distill.recordings.annotation import annotate
    from hf_distill.recordings.recorder import load_recording, record
    from hf_distill.teachers import AdapterTeacher
    from hf_distill.training.arguments import DistillationArguments
    from hf_distill.training.on_policy import written_rows
    from hf_distill.training.seq2seq import (
        Seq2SeqDistillationArguments,
        Seq2SeqDistillationTrainer,
    )
    from hf_distill.training.trainer import DistillationTrainer

__version__ = "0.1.0"

# The package of each public name. Names are imported on first use, so that `hf-distill --help` does
# not wait for torch, transformers and peft.
_PACKAGES = {
    "AdapterTeacher": "teachers",
    "DistillationArguments": "training",
    "DistillationTrainer": "training",
    "InputError": "errors",
    "Seq2SeqDistillationArguments": "training",
    "Seq2SeqDistillationTrainer": "training",
    "Term": "losses",
    "annotate": "recordings",
    "evaluate_student": "evaluation",
    "evaluate_written": "evaluation",
    "load_recording": "recordings",
    "record": "recordings",
    "student_from_teacher": "models",
    "written_rows": "training",
}

__all__ = [
    "AdapterTeacher",
    "DistillationArguments",
    "DistillationTrainer",
    "InputError",
    "Seq2SeqDistillationArguments",
    "Seq2SeqDistillationTrainer",
    "Term",
    "annotate",
    "evaluate_student",
    "evaluate_written",
    "load_recording",
    "record",
    "student_from_teacher",
    "written_rows",
]


def __getattr__(name: str) -> Any:
    if name not in _PACKAGES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PACKAGES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
