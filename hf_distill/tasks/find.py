"""Find the task of a model."""

from __future__ import annotations

from typing import Any

from hf_distill.errors import InputError
from hf_distill.models.base import base_model
from hf_distill.tasks.base import Task
from hf_distill.tasks.causal_lm import CausalLM

TASKS: tuple[Task, ...] = (CausalLM(),)


def find_task(model: Any, role: str) -> Task:
    """The first task that the model fits.

    role: "student" or "teacher", for the error
    raises: InputError with the reason of each task that it does not fit
    """
    plain = base_model(model)
    reasons = []
    for task in TASKS:
        reason = task.refusal(plain)
        if reason is None:
            return task
        reasons.append(f"{task.name}: {reason}")
    raise InputError(
        f"the {role} is a {type(plain).__name__}, which no task of this version fits "
        f"({'; '.join(reasons)})"
    )
