"""Knowledge distillation as a Hugging Face Trainer."""

from hf_distill.arguments import DistillationArguments
from hf_distill.errors import InputError
from hf_distill.evaluation import evaluate_student
from hf_distill.objective import Term
from hf_distill.recorder import load_recording, record
from hf_distill.students import student_from_teacher
from hf_distill.teachers import AdapterTeacher
from hf_distill.trainer import DistillationTrainer

__version__ = "0.1.0"

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
