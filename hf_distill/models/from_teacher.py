"""A smaller student made of chosen layers of its teacher.

One mechanism serves every architecture, none is known by name. The layers are found as the
``nn.ModuleList``s whose length a layer count in the config states; which count governs which list
is probed, by building the shorter model without memory (meta device) and looking. Per-layer lists
of the config are cut alike, weights are carried over by layer index, and the student is refused
unless every weight of every chosen layer found its place and every layer still does what it did.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_distill.errors import InputError
from hf_distill.models.loading import load_model

RULES = ("every_other", "first_and_last")

Layers = str | Sequence[int]


@dataclass(frozen=True)
class Stack:
    """A list of repeated blocks in a model."""

    name: str  # "encoder" or "decoder" where the path says so, otherwise the path
    path: str  # where the nn.ModuleList is, as in ``model.get_submodule(path)``
    length: int


def student_from_teacher(
    teacher: PreTrainedModel | str | Path,
    layers: Layers | Mapping[str, Layers] = "every_other",
    *,
    num_layers: int | None = None,
) -> PreTrainedModel:
    """A new model of the teacher's class with some of its layers, and everything else, copied.

    teacher: a loaded transformers model of any task, or the id or folder of a causal one
    layers: which layers to take
        "every_other": layers 0, 2, 4, ...
        "first_and_last": ``num_layers`` layers, evenly spaced, the first and the last among them;
            by default half of them, which is how DistilBERT and DistilGPT2 were initialised
            (0, 2, 4, 7, 9, 11 of 12)
        a list of layer indices, ascending
        for an encoder-decoder, one of these for both, or {"encoder": ..., "decoder": ...}, where
            the side that is not named is kept whole
    returns: a model in evaluation mode on the teacher's device, in its dtype, with its generation
        config, its weights tied as the teacher's are; no memory is shared with the teacher
    raises: InputError if the selection does not fit the teacher, or if a layer would not compute
        in its new place what it computed in the teacher
    """
    if not isinstance(teacher, PreTrainedModel):
        teacher = load_model(_name(teacher), "teacher")
    blueprint = _blueprint(type(teacher), teacher.config)
    chosen = choose_layers(_stacks(blueprint), layers, num_layers)
    config = _shorter_config(type(teacher), teacher.config, chosen)
    outline = _blueprint(type(teacher), config)
    weights = _weights(teacher, outline, chosen)
    _check_behaviour(blueprint, outline, chosen)

    student = type(teacher).from_pretrained(
        None, config=config, state_dict=weights, dtype=teacher.dtype
    )
    student.name_or_path = student.config.name_or_path = ""  # it is on no disk and no Hub yet
    if teacher.can_generate():
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.to(teacher.device)  # type: ignore[arg-type]  # its decorator hides self


def choose_layers(
    stacks: Sequence[Stack], layers: Layers | Mapping[str, Layers], num_layers: int | None = None
) -> dict[Stack, list[int]]:
    """The indices that a selection takes from each stack; see `student_from_teacher`."""
    names = {stack.name for stack in stacks}
    if isinstance(layers, Mapping):
        if unknown := set(layers) - names:
            raise InputError(
                f"layers names {', '.join(map(repr, sorted(map(str, unknown))))}, but this teacher "
                f"has {', '.join(map(repr, sorted(names)))}: name one of these"
            )
        rules = dict(layers)
    else:
        rules = dict.fromkeys(names, layers)
    if num_layers is not None and "first_and_last" not in list(rules.values()):
        raise InputError(
            f"num_layers={num_layers} has no effect on layers={layers!r}: it belongs to "
            "'first_and_last', leave it out or choose that"
        )
    return {
        stack: _indices(stack, rules[stack.name], num_layers)
        if stack.name in rules
        else list(range(stack.length))
        for stack in stacks
    }


def _name(teacher: object) -> str | Path:
    if isinstance(teacher, str | Path):
        return teacher
    raise InputError(
        f"teacher is a {type(teacher).__name__}, not a transformers model: give a PreTrainedModel "
        "(merge an adapter into it first) or the id or folder of one"
    )


def _indices(stack: Stack, layers: Layers, num_layers: int | None) -> list[int]:
    if layers == "every_other":
        return list(range(0, stack.length, 2))
    if layers == "first_and_last":
        return _evenly_spaced(stack, num_layers)
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise InputError(
            f"layers={layers!r} is not a selection: give {' or '.join(map(repr, RULES))}, or a "
            "list of layer indices"
        )
    indices: list[Any] = list(layers)
    fits = all(type(i) is int and 0 <= i < stack.length for i in indices)
    if not indices or not fits or sorted(set(indices)) != indices:
        raise InputError(
            f"layers={indices!r} does not select layers of the teacher's {stack.name}: give "
            f"different indices from 0 to {stack.length - 1} in ascending order"
        )
    return indices


def _evenly_spaced(stack: Stack, num_layers: int | None) -> list[int]:
    count = max(2, (stack.length + 1) // 2) if num_layers is None else num_layers
    if type(count) is not int or not 2 <= count <= stack.length:
        raise InputError(
            f"num_layers={count!r} cannot hold the first and the last of the {stack.length} layers "
            f"of the teacher's {stack.name}: give 2 to {stack.length}, or list the layers"
        )
    gaps = count - 1
    return [(i * (stack.length - 1) + gaps // 2) // gaps for i in range(count)]


def _blueprint(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The model that a config describes, without memory for its weights."""
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))


def _layer_counts(config: PreTrainedConfig) -> dict[str, int]:
    """The config's fields that may state how many layers there are."""
    return {k: v for k, v in config.to_dict().items() if "layer" in k and type(v) is int}


def _stacks(blueprint: PreTrainedModel) -> list[Stack]:
    """The outermost lists of blocks whose length the config states."""
    counts = set(_layer_counts(blueprint.config).values())
    paths: dict[str, int] = {}
    for path, module in blueprint.named_modules():
        nested = any(path.startswith(f"{outer}.") for outer in paths)
        if isinstance(module, nn.ModuleList) and not nested and len(module) in counts:
            paths[path] = len(module)
    if not paths:
        raise InputError(
            f"no layers found in {type(blueprint).__name__}: no list of blocks is as long as a "
            "layer count of its config, so build the student from a config or a checkpoint"
        )
    sides = {path: {"encoder", "decoder"} & set(path.split(".")) for path in paths}
    named = {path: side.pop() if len(side) == 1 else path for path, side in sides.items()}
    return [Stack(named[path], path, length) for path, length in paths.items()]


def _shorter_config(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    chosen: Mapping[Stack, list[int]],
) -> PreTrainedConfig:
    """The config of the model with the chosen layers only."""
    shorter = copy.deepcopy(config)
    fields: dict[str, list[int]] = {}
    for stack, kept in chosen.items():
        if len(kept) == stack.length:
            continue
        field = _count_field(model_class, config, stack, kept)
        if fields.setdefault(field, kept) != kept:
            raise InputError(
                f"{field} of the config counts several stacks of layers of {model_class.__name__}, "
                f"{stack.name} among them: take the same layers from each"
            )
    for field, kept in fields.items():
        _shorten(shorter, field, kept)
    try:
        shorter.validate()
        type(shorter).from_dict(shorter.to_dict())  # what a reload of the saved student does
    except Exception as error:
        raise InputError(
            f"the config of {model_class.__name__} cannot be shortened to layers "
            f"{list(fields.values())} ({str(error).strip().splitlines()[-1].strip()}): build the "
            "student from a config or a checkpoint"
        ) from error
    return shorter


def _count_field(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, stack: Stack, kept: list[int]
) -> str:
    """The config field that says how long a stack is, found by changing it."""
    for field, count in _layer_counts(config).items():
        if count != stack.length:
            continue
        probe = copy.deepcopy(config)
        try:
            _shorten(probe, field, kept)
            built = _blueprint(model_class, probe)
        except Exception:  # any error means: not a model, so not the field
            continue
        if len(built.get_submodule(stack.path)) == len(kept):  # type: ignore[arg-type]
            return field
    raise InputError(
        f"no config field of {model_class.__name__} sets the length of its {stack.name}: build the "
        "student from a config or a checkpoint"
    )


def _shorten(config: PreTrainedConfig, field: str, kept: list[int]) -> None:
    """Set a layer count and cut the lists that have one value for each layer, in place."""
    count = getattr(config, field)
    for name, value in config.to_dict().items():
        # Several end-of-text ids are a list too, and may happen to be as many as the layers.
        if isinstance(value, list | tuple) and len(value) == count and "token" not in name:
            setattr(config, name, type(value)(value[i] for i in kept))
    setattr(config, field, len(kept))


def _weights(
    teacher: PreTrainedModel, outline: PreTrainedModel, chosen: Mapping[Stack, list[int]]
) -> dict[str, Tensor]:
    """The student's state dict: the teacher's values, copied, under the student's layer indices."""
    source = teacher.state_dict()
    wanted = outline.state_dict()
    origin = {key: _origin(key, source, chosen) for key in wanted}
    for key, value in wanted.items():
        found = source.get(origin[key])
        if found is None or found.is_meta or found.shape != value.shape:
            raise InputError(
                f"the teacher's weight {origin[key]!r} does not fit what its config describes "
                "(quantised, sharded, offloaded, or changed by an adapter?): load it whole and "
                "unquantised, and merge adapters first"
            )
    if lost := _belonging(source, chosen) - set(origin.values()):
        raise InputError(
            f"the student has no place for the teacher's weight {min(lost)!r}, because the layer "
            "is built differently in its new place (or has an adapter): choose other layers"
        )
    return {key: source[origin[key]].detach().to("cpu", copy=True) for key in wanted}


def _origin(key: str, source: Mapping[str, Tensor], chosen: Mapping[Stack, list[int]]) -> str:
    """The teacher's key for a student's key.

    What only the layer of that index has, whichever layers were chosen (T5 keeps the relative
    position bias of all layers in block 0), comes from the teacher's layer of the same index.
    """
    for stack, kept in chosen.items():
        if key.startswith(f"{stack.path}."):
            index, _, rest = key.removeprefix(f"{stack.path}.").partition(".")
            moved = f"{stack.path}.{kept[int(index)]}.{rest}"
            return moved if moved in source else key
    return key


def _belonging(source: Mapping[str, Tensor], chosen: Mapping[Stack, list[int]]) -> set[str]:
    """The teacher's keys that the student must take: all but those of the layers left out."""
    left_out = tuple(
        f"{stack.path}.{i}."
        for stack, kept in chosen.items()
        for i in range(stack.length)
        if i not in kept
    )
    return {key for key in source if not key.startswith(left_out)} if left_out else set(source)


def _check_behaviour(
    blueprint: PreTrainedModel, outline: PreTrainedModel, chosen: Mapping[Stack, list[int]]
) -> None:
    """Refuse a layer that would compute something else, because its index decides what it does."""
    for stack, kept in chosen.items():
        for new, old in enumerate(kept):
            before = blueprint.get_submodule(f"{stack.path}.{old}")
            after = outline.get_submodule(f"{stack.path}.{new}")
            if before.state_dict().keys() != after.state_dict().keys():
                continue  # carries what its index alone has, see `_origin`
            settings = _settings(before)
            for name, value in _settings(after).items():
                if settings.get(name, value) != value:
                    raise InputError(
                        f"layer {old} of the teacher's {stack.name} cannot become layer {new}: "
                        f"its {name} is {settings[name]!r} there and {value!r} here, which the "
                        "index decides: choose layers for which it stays the same"
                    )


def _settings(block: nn.Module) -> dict[str, Any]:
    """The numbers and switches that decide what a block computes, by dotted name."""
    return {
        f"{path}.{name}".lstrip("."): value
        for path, module in block.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str | None)
        and not name.startswith(("_", "layer_i"))  # layer_idx, layer_id: where its cache is
    }
