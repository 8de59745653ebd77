"""Load a trainer's student by id or path, for the task of its checkpoint or of its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn

from hf_distill.errors import InputError, warn_once
from hf_distill.models.base import base_model
from hf_distill.models.heads import model_types, saved_task
from hf_distill.models.loading import CLASSES, load_config, load_model
from hf_distill.reporting.formatting import compact
from hf_distill.tasks import find_task
from hf_distill.teachers import AdapterTeacher, LiveTeacher
from hf_distill.training.arguments import DistillationArguments


def load_student(
    name: str | Path, teacher: Any, task: str | None, args: DistillationArguments
) -> Any:
    """The student of a trainer. A new head for classes has the classes of the teacher.

    teacher: as the trainer gets it
    task: its key; None for that of the checkpoint, or of the teacher if the checkpoint was saved
        without a head
    raises: InputError for a checkpoint that cannot be read, or whose task is not known
    """
    kwargs = dict(args.model_kwargs("student"))
    config = load_config(name, "student", **kwargs)
    saved = saved_task(config)
    if saved is not None and task in (None, saved):
        return load_model(name, "student", task, **kwargs)
    theirs, classes = _of_teacher(teacher, args)
    task = task or theirs
    if task is None and _is_encoder(config):
        raise InputError(
            f"student {str(name)!r} was saved without the head of a task, and no teacher tells "
            'its task: pass task=, such as task="sequence-classification"'
        )
    if task == theirs and not set(CLASSES) & kwargs.keys():
        kwargs |= classes
    return load_model(name, "student", task, **kwargs)


def check_distinct(model: Any, teacher: Any, peft_config: PeftConfig | None) -> None:
    """InputError for one model in both roles, unless an adapter is switched off to teach."""
    adapted = isinstance(model, PeftModel) or peft_config is not None
    if isinstance(model, nn.Module) and model is teacher and not adapted:
        raise InputError(
            "student and teacher are the same object, but the teacher must stay as it is while the "
            "student is trained: load the teacher a second time, or train an adapter (peft_config=)"
        )


def warn_if_larger(student: Any, teacher: Any) -> None:
    """Warn of a student with more parameters than its teacher: the arguments may be swapped."""
    of_its_own = isinstance(teacher, LiveTeacher) and not isinstance(teacher, AdapterTeacher)
    if student is None or not of_its_own:
        return
    ours, theirs = _parameters(student), _parameters(teacher.model)
    # A few tokens more in the student's vocabulary, or another head, are no sign of a mistake.
    if theirs and ours > 1.01 * theirs:
        warn_once(
            "The student has %s parameters, but the teacher only %s: check that the student is the "
            "first argument and the teacher the second.",
            compact(ours),
            compact(theirs),
        )


def _parameters(model: Any) -> int:
    """How many a model has without its adapters; 0 if it is quantised, where weights are packed."""
    if getattr(base_model(model).config, "quantization_config", None) is not None:
        return 0
    adapters = {*getattr(model, "peft_config", {})}
    return sum(
        getattr(parameter, "ds_numel", parameter.numel())  # DeepSpeed ZeRO-3 holds a shard
        for name, parameter in model.named_parameters()
        if not adapters & {*name.split(".")}  # peft names an adapter's weights after it
    )


def _is_encoder(config: Any) -> bool:
    """Whether a model without a head may serve any task, and not only write text."""
    writes = config.is_encoder_decoder or getattr(config, "is_decoder", False)
    return config.model_type in model_types("masked-lm") and not writes


def _of_teacher(teacher: Any, args: DistillationArguments) -> tuple[str | None, dict[str, Any]]:
    """The task of a teacher, None if it is not known, and the classes of its head."""
    if isinstance(teacher, str | Path):
        config: Any = load_config(teacher, "teacher", **args.model_kwargs("teacher"))
        task = saved_task(config)
    else:
        model = base_model(getattr(teacher, "model", teacher))
        if getattr(model, "config", None) is None:
            return None, {}
        config, task = model.config, find_task(model, "teacher").key
    if task not in ("sequence-classification", "token-classification"):
        return task, {}
    return task, {key: getattr(config, key) for key in CLASSES if getattr(config, key, None)}
