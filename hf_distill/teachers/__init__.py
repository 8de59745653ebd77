"""Teachers: live models, the student's own base, and where their weights are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.errors import InputError
from hf_distill.teachers.adapter import AdapterTeacher
from hf_distill.teachers.live import LiveTeacher
from hf_distill.teachers.placement import check_placement, load_placed
from hf_distill.teachers.protocol import Teacher

__all__ = [
    "AdapterTeacher",
    "LiveTeacher",
    "Teacher",
    "as_teacher",
]


def as_teacher(
    teacher: PreTrainedModel | PeftModel | Teacher | str | Path | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    task: str | None = None,
    whole_logits: bool = False,
    placement: str = "auto",
    **model_kwargs: Any,
) -> Teacher | None:
    """Make a teacher of a model, an id, a path or an object with the protocol; None stays None.

    tokenizer: the teacher's; task, whole_logits, placement: see `LiveTeacher`
    model_kwargs: for `from_pretrained`, where it is an id or a path
    raises: InputError for anything else
    """
    check_placement(placement)
    if isinstance(teacher, str | Path):
        teacher, placement = load_placed(teacher, placement, task, **model_kwargs)
    if isinstance(teacher, PreTrainedModel | PeftModel):
        return LiveTeacher(
            teacher, tokenizer, task=task, whole_logits=whole_logits, placement=placement
        )
    if isinstance(teacher, AdapterTeacher) and placement in ("sharded", "offloaded"):
        raise InputError(
            f"teacher_placement is {placement!r}, but this teacher uses the student's own weights, "
            "which the student's engine places: leave teacher_placement at 'auto'"
        )
    if teacher is None or isinstance(teacher, Teacher):
        return teacher
    raise InputError(
        f"teacher is a {type(teacher).__name__}, but must be a model, an id or path, or an object "
        "with name, rows, tokenizer, prepare() and signal()"
    )
