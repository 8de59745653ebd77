"""The config of a model with some of its layers, for any architecture.

A config may state its layers as a count, as a list, string or dictionary with a value for each
layer, or as a list of layer indices. All of these are shortened. To find the field that decides the
length of a stack, each is shortened in turn and the model is built on the meta device.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_distill.errors import InputError
from hf_distill.models.layer_selection import Stack

COUNT_NAMES = ("layer", "block")


def blueprint(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The model that a config describes, without memory for its weights."""
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))


def find_stacks(model: PreTrainedModel) -> list[Stack]:
    """The outermost lists of blocks whose length the config states.

    raises: InputError where there is none
    """
    lengths = {_length(value) for value in _statements(model.config).values()}
    paths: dict[str, int] = {}
    for path, module in model.named_modules():
        nested = any(path.startswith(f"{outer}.") for outer in paths)
        if isinstance(module, nn.ModuleList) and not nested and len(module) in lengths:
            paths[path] = len(module)
    if not paths:
        raise InputError(
            f"no layers found in {type(model).__name__}: its config states no number of layers "
            "that a list of blocks has, so build the student from a config or a checkpoint"
        )
    sides = {path: {"encoder", "decoder"} & set(path.split(".")) for path in paths}
    named = {path: side.pop() if len(side) == 1 else path for path, side in sides.items()}
    return [Stack(named[path], path, length) for path, length in paths.items()]


def shorter_config(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    chosen: Mapping[Stack, list[int]],
) -> PreTrainedConfig:
    """The config of the model with the chosen layers only.

    raises: InputError where the config cannot be cut so, or would not be valid
    """
    shorter = copy.deepcopy(config)
    fields: dict[tuple[str, ...], list[int]] = {}
    for stack, kept in chosen.items():
        if len(kept) == stack.length:
            continue
        found = _deciding_fields(model_class, config, stack, kept)
        if fields.setdefault(found, kept) != kept:
            raise InputError(
                f"{', '.join(found)} of the config counts several stacks of layers of "
                f"{model_class.__name__}, {stack.name} among them: take the same layers from each"
            )
    try:
        for found, kept in fields.items():
            further = _further_counts(model_class, config, chosen, found, kept)
            _cut(shorter, (*found, *further), kept)
        shorter.validate()
        type(shorter).from_dict(shorter.to_dict())  # what a reload of the saved student does
    except Exception as error:
        raise InputError(
            f"the config of {model_class.__name__} cannot be shortened to layers "
            f"{list(fields.values())} ({str(error).strip().splitlines()[-1].strip()}): build the "
            "student from a config or a checkpoint"
        ) from error
    return shorter


def _statements(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields that may state how many layers there are."""
    return {
        name: value
        for name, value in config.to_dict().items()
        if any(word in name for word in COUNT_NAMES) and _length(value)
    }


def _length(value: Any) -> int:
    if type(value) is int:
        return value
    return len(value) if isinstance(value, list | tuple | str) else 0


def _deciding_fields(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, stack: Stack, kept: list[int]
) -> tuple[str, ...]:
    """The fields that decide the length of a stack: one of them, or several together."""
    stated = [name for name, value in _statements(config).items() if _length(value) == stack.length]
    for fields in [(name,) for name in stated] + ([tuple(stated)] if len(stated) > 1 else []):
        probe = copy.deepcopy(config)
        try:
            _cut(probe, fields, kept)
            built = blueprint(model_class, probe)
        except Exception:  # the model cannot be built with these fields, so they are not the ones
            continue
        if len(built.get_submodule(stack.path)) == len(kept):  # type: ignore[arg-type]
            return fields
    raise InputError(
        f"no config field of {model_class.__name__} sets the length of its {stack.name}: build the "
        "student from a config or a checkpoint"
    )


def _further_counts(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    chosen: Mapping[Stack, list[int]],
    fields: tuple[str, ...],
    kept: list[int],
) -> list[str]:
    """Other fields that state the same count and decide no stack (xLSTM has two)."""
    values = _statements(config)
    count, further = _length(values[fields[0]]), []
    for name, value in values.items():
        if name in fields or type(value) is not int or value != count:
            continue
        probe = copy.deepcopy(config)
        try:
            _cut(probe, (name,), kept)
            built = blueprint(model_class, probe)
        except Exception:
            continue
        lengths = [len(built.get_submodule(stack.path)) for stack in chosen]  # type: ignore[arg-type]
        if lengths == [stack.length for stack in chosen]:
            further.append(name)
    return further


def _cut(config: PreTrainedConfig, fields: tuple[str, ...], kept: list[int]) -> None:
    """Set the layer counts of a stack, and cut what has values for each of its layers, in place."""
    values = config.to_dict()
    count = _length(values[fields[0]])
    later: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and _is_by_layer(name, value, count):
            moved = {int(key): inner for key, inner in value.items()}
            later[name] = {new: moved[old] for new, old in enumerate(kept) if old in moved}
        # Several end-of-text ids are a list too, and may happen to be as many as the layers.
        elif isinstance(value, list | tuple) and "token" not in name:
            if _is_indices(name, value, count):
                cut = [kept.index(index) for index in value if index in kept]
                setattr(config, name, type(value)(cut))
            elif len(value) == count:
                setattr(config, name, type(value)(value[i] for i in kept))
        elif isinstance(value, str) and name in _statements(config) and len(value) == count:
            setattr(config, name, "".join(value[i] for i in kept))
    for name in fields:
        if type(values[name]) is int:
            setattr(config, name, len(kept))
    for name, value in later.items():  # their setters may read the counts
        setattr(config, name, value)


def _is_indices(name: str, value: Any, count: int) -> bool:
    """Whether a list names layers, as `moe_layers: [1, 3]` does, instead of describing each."""
    if count < 3 or not any(word in name for word in COUNT_NAMES) or not value:
        return False
    if not all(type(index) is int and 0 <= index < count for index in value):
        return False
    return all(a < b for a, b in pairwise(value)) and "types" not in name


def _is_by_layer(name: str, value: Mapping[Any, Any], count: int) -> bool:
    if not value or not any(word in name for word in COUNT_NAMES):
        return False
    return all(str(key).isdigit() and int(key) < count for key in value)
