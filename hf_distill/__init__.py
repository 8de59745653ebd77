"""Knowledge distillation as a Hugging Face Trainer."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_distill.arguments import DistillationArguments
    from hf_distill.errors import InputError
    from hf_distill.evaluation import evaluate_student
    from hf_distill.objective import Term
    from hf_distill.recorder import load_recording, record
    from hf_distill.students import student_from_teacher
    from hf_distill.teachers import AdapterTeacher
    from hf_distill.trainer import DistillationTrainer

__version__ = "0.1.0"

# Where each public name lives. Imported when first asked for, so that `hf-distill --help` does not
# wait for torch, transformers and peft.
_ROOMS = {
    "AdapterTeacher": "teachers",
    "DistillationArguments": "arguments",
    "DistillationTrainer": "trainer",
    "InputError": "errors",
    "Term": "objective",
    "evaluate_student": "evaluation",
    "load_recording": "recorder",
    "record": "recorder",
    "student_from_teacher": "students",
}

__all__ = [
    "AdapterTeacher",
    "DistillationArguments",
    "DistillationTrainer",
    "InputError",
    "Term",
    "evaluate_student",
    "load_recording",
    "record",
    "student_from_teacher",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
