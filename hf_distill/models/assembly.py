"""Make a student from weights of its teacher, and check that a teacher's weights can be used."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_distill.errors import InputError


def assembled(
    teacher: PreTrainedModel, config: PreTrainedConfig, weights: Mapping[str, Tensor]
) -> PreTrainedModel:
    """A model of the teacher's class with copies of these weights, on its device."""
    copies: dict[str, Any] = {
        key: weight.detach().to("cpu", copy=True) for key, weight in weights.items()
    }
    student = type(teacher).from_pretrained(
        None, config=config, state_dict=copies, dtype=teacher.dtype
    )
    student.name_or_path = student.config.name_or_path = ""  # it is not saved anywhere yet
    if teacher.can_generate():
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.to(teacher.device)  # type: ignore[arg-type]  # its decorator hides self


def check_weights(teacher: PreTrainedModel, whole: PreTrainedModel) -> None:
    """InputError for a teacher whose weights are not those that its config describes."""
    source = teacher.state_dict()
    for key, value in whole.state_dict().items():
        found = source.get(key)
        if found is None or found.is_meta or found.shape != value.shape:
            raise InputError(
                f"the teacher's weight {key!r} does not fit what its config describes "
                "(quantised, sharded, offloaded, or changed by an adapter?): load it whole and "
                "unquantised, and merge adapters first"
            )
    if further := source.keys() - whole.state_dict().keys():
        raise InputError(
            f"the teacher has a weight {min(further)!r} that its config does not describe (an "
            "adapter?): merge adapters first"
        )
