"""The keys of trainings in a recipe: the fields of the arguments classes, and LoRA adapters."""

from __future__ import annotations

import dataclasses
import functools
import operator
import types
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator
from transformers import TrainingArguments

from hf_distill.training.arguments import DistillationArguments


class Section(BaseModel):
    """A part of a recipe. Unknown keys are refused; values do not change after reading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True
    )


# Keys that are set elsewhere in a recipe or do not apply to one, with the alternative.
RESERVED = {
    "output_dir": "checkpoints go to the run folder, output_dir/name",
    "seed": "the recipe's own 'seed' sets it",
    "data_seed": "the recipe's own 'seed' sets it",
    "teacher_model_kwargs": "use 'teacher.model_kwargs'",
    "teacher_placement": "use 'teacher.placement'",
    "max_length": "use 'data.max_length'",
    "packing": "use 'data.packing'",
    "max_target_length": "use 'data.max_target_length'",
    "source_prefix": "use 'data.prefix'",
    "source_lang": "use 'data.source_lang'",
    "target_lang": "use 'data.target_lang'",
    "doc_stride": "use 'data.stride'",
    "mlm_probability": "use 'data.mask_probability'",
    "completion_only_loss": "the loss on prompt/completion rows is always on completions only",
    "assistant_only_loss": "the loss on chat rows is always on the assistant's turns only",
    "student_model_kwargs": "use 'student.model_kwargs'",
    "resume_from_checkpoint": "an interrupted stage resumes by itself",
    "do_train": "the stages decide it",
    "do_eval": "the stages decide it",
    "do_predict": "the stages decide it",
    "prediction_loss_only": "the stages decide it",
    "remove_unused_columns": "the stages decide it",
    "push_to_hub": "run `hf-distill publish`",
    "hub_model_id": "use 'publish.repo_id'",
    "hub_private_repo": "use 'publish.private'",
    "hub_token": "log in with `hf auth login`",
    "hub_strategy": "run `hf-distill publish`",
    "hub_always_push": "run `hf-distill publish`",
    "hub_revision": "run `hf-distill publish`",
    "deepspeed": "use `accelerate launch --config_file`",
    "fsdp": "use `accelerate launch --config_file`",
    "fsdp_config": "use `accelerate launch --config_file`",
    "parallelism_config": "use `accelerate launch --config_file`",
    "accelerator_config": "use `accelerate launch --config_file`",
    "local_rank": "`accelerate launch` sets it",
}

# Trainer accepts any number for these and fails later.
COUNTS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)

# How a training inside a recipe differs from a bare Trainer. Steps below 1 are shares of the run.
TRAIN_DEFAULTS: dict[str, Any] = {
    "report_to": "none",
    "disable_tqdm": False,
    "ddp_find_unused_parameters": False,
    "bf16": "auto",
    "logging_steps": 0.01,
    "eval_strategy": "steps",
    "eval_steps": 0.2,
    "save_steps": 0.1,
    "save_total_limit": 1,
}


def _plain(hint: Any) -> Any:
    """A field's type without enums and classes, which YAML cannot state."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    kept = [
        part
        for part in get_args(hint)
        if not isinstance(part, type) or part is type(None) or not issubclass(part, Enum)
    ]
    return functools.reduce(operator.or_, kept)


class AdapterSection(Section):
    """LoRA adapters, which are trained while the model itself is frozen (`peft`)."""

    r: int = Field(default=8, ge=1)
    """Rank of the adapters."""
    alpha: float = Field(default=16, gt=0)
    """The scale of the adapters is alpha / r (`lora_alpha`)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the adapters (`lora_dropout`)."""
    target_modules: str | list[str] | None = None
    """Names of the layers that get an adapter; by default those of peft for the model type."""
    modules_to_save: list[str] | None = None
    """Layers that are trained in full in addition to the adapters."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r)."""
    use_dora: bool = False
    """Adapt direction and length of the weights separately."""


class _Training(Section):
    """The keys of a train section beside the fields of its arguments class."""

    global_batch_size: int | None = Field(default=None, ge=1)
    """Rows of an optimizer step over all processes, so that steps are the same on any number of
    processes. `per_device_train_batch_size`, if given, limits the rows that a device processes at a
    time."""

    @model_validator(mode="before")
    @classmethod
    def _no_is_a_word(cls, values: Any) -> Any:
        """YAML reads an unquoted `no` as false, but a strategy has that name."""
        if not isinstance(values, dict):
            return values
        return {
            key: "no" if value is False and key.endswith("_strategy") else value
            for key, value in values.items()
        }

    @model_validator(mode="after")
    def _one_batch_size(self) -> _Training:
        for name in ("gradient_accumulation_steps", "auto_find_batch_size"):
            if self.global_batch_size is not None and getattr(self, name):
                raise ValueError(
                    f"has 'global_batch_size' and {name!r}, but the first alone decides how many "
                    "rows a step takes: leave the second out"
                )
        return self


class _Adapting(_Training):
    """The keys of the adaptation of a teacher."""

    lora: AdapterSection | None = None
    """Train adapters and merge them into the teacher; by default all weights are trained."""


def _train_section(
    name: str, doc: str, arguments: type[TrainingArguments], base: type[Section] = _Training
) -> type[Section]:
    """A section with the fields of an arguments class; None leaves one to Trainer's default."""
    hints = get_type_hints(arguments)
    of_trainer = {field.name for field in dataclasses.fields(TrainingArguments)}
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(arguments):
        if not field.init or field.name in RESERVED:
            continue
        hint = _plain(hints[field.name])
        if field.name == "bf16":
            hint = bool | Literal["auto"]
        description = (field.metadata.get("help") or "").split("\n")[0]
        own = None if field.name in of_trainer else field.default
        default = TRAIN_DEFAULTS.get(field.name, own)
        least = 1 if field.name in COUNTS else None
        fields[field.name] = (
            hint | None,
            Field(default=default, description=description, ge=least),
        )
    return create_model(name, __base__=base, __doc__=doc, **fields)


PretrainSection = _train_section(
    "PretrainSection", "How the teacher is trained.", TrainingArguments
)
AdaptSection = _train_section(
    "AdaptSection", "How the teacher is adapted to the rows.", TrainingArguments, _Adapting
)
TrainSection = _train_section(
    "TrainSection", "How baseline and student are trained.", DistillationArguments
)


def arguments(section: Section) -> dict[str, Any]:
    """The keyword arguments that a train section sets."""
    return section.model_dump(mode="json", exclude_none=True)
