"""Find the task of a model."""

from __future__ import annotations

from typing import Any

from hf_distill.errors import InputError
from hf_distill.models.base import base_model
from hf_distill.tasks.base import Task
from hf_distill.tasks.causal_lm import CausalLM
from hf_distill.tasks.classification import SequenceClassification, TokenClassification
from hf_distill.tasks.masked_lm import MaskedLM
from hf_distill.tasks.question_answering import QuestionAnswering
from hf_distill.tasks.seq2seq_lm import Seq2SeqLM

TASKS: tuple[type[Task], ...] = (
    CausalLM,
    Seq2SeqLM,
    MaskedLM,
    SequenceClassification,
    TokenClassification,
    QuestionAnswering,
)


def find_task(model: Any, role: str, wanted: str | None = None) -> Task:
    """The task of a model: the one that is wanted, or the first that it fits.

    role: "student" or "teacher", for the error
    wanted: the `key` of a task
    raises: InputError with the reason of each task that it does not fit
    """
    plain = base_model(model)
    tasks = TASKS if wanted is None else (named_task(wanted),)
    reasons = []
    for task in tasks:
        reason = task.refusal(plain)
        if reason is None:
            return task.of(plain)
        reasons.append(f"{task.name}: {reason}")
    if wanted is not None:
        raise InputError(
            f"the {role} is a {type(plain).__name__}, which does not fit {'; '.join(reasons)}"
        )
    raise InputError(
        f"the {role} is a {type(plain).__name__}, which no task of this version fits "
        f"({'; '.join(reasons)})"
    )


def named_task(key: str) -> type[Task]:
    """The task with this key; InputError if there is none."""
    for task in TASKS:
        if task.key == key:
            return task
    known = ", ".join(task.key for task in TASKS)
    raise InputError(f"task is {key!r}, but must be one of {known}")
