"""The config of a narrower model, for any architecture.

Candidate fields of the config are found by their names and tested: a field is changed, the model is
built on the meta device, and the shapes of its weights show what the field decides.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_distill.errors import InputError
from hf_distill.models.layer_selection import Stack
from hf_distill.models.shorter_config import blueprint

FFN_NAMES = ("ff", "intermediate", "inner", "hidden_dim")
SHARED_HEADS = ("key_value", "kv")

Width = int | float


@dataclass(frozen=True)
class Widths:
    """The widths given to `student_from_teacher`; None keeps a width."""

    ffn: Width | None = None
    heads: Width | None = None
    hidden: Width | None = None

    def __bool__(self) -> bool:
        return any(width is not None for width in vars(self).values())

    def __str__(self) -> str:
        given = {name: width for name, width in vars(self).items() if width is not None}
        return ", ".join(f"{name}={width}" for name, width in given.items())


@dataclass(frozen=True)
class Narrower:
    """A narrower config, and what it changes.

    changes: field of the config -> (width of the teacher, width of the student)
    ffn_axes: (key of a weight, dimension) -> neurons of the teacher along it, of every feed-forward
        network, cut or not
    hidden: the width of the hidden states, of teacher and student
    heads, groups: by stack, attention heads and groups of heads that share a key, of the teacher
    kept_groups: by stack, the groups of the student
    """

    config: PreTrainedConfig
    changes: dict[str, tuple[int, int]]
    ffn_axes: dict[tuple[str, int], int]
    hidden: tuple[int, int]
    heads: dict[str, int] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    kept_groups: dict[str, int] = field(default_factory=dict)


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by a weight; see `input_dim`."""
    return isinstance(module, nn.Linear | Conv1D)


def input_dim(module: nn.Module) -> int:
    """The dimension of a linear module's weight that belongs to its input."""
    return 0 if isinstance(module, Conv1D) else 1


def hidden_width(model: PreTrainedModel) -> int:
    """The number of features of a model's input embeddings."""
    embeddings: Any = model.get_input_embeddings()
    return embeddings.weight.shape[1]


def target(name: str, asked: Width, whole: int, step: int = 1) -> int:
    """A width as a number; a share is rounded to the nearest one that is possible.

    whole: the teacher's; step: the width must be a multiple of it
    raises: InputError for a width that is no part of the teacher's
    """
    if isinstance(asked, float) and 0 < asked < 1:
        return max(1, round(asked * whole / step)) * step
    if type(asked) is not int or not 0 < asked <= whole:
        raise InputError(
            f"{name}={asked!r} is no part of the teacher's {whole}: give a number from {step} to "
            f"{whole}, or a share between 0 and 1"
        )
    if asked % step:
        nearest = sorted({max(1, asked // step) * step, min(whole, (asked // step + 1) * step)})
        raise InputError(
            f"{name}={asked} would split a group of {step} heads that share a key and a value: "
            f"give {' or '.join(map(str, nearest))}"
        )
    return asked


def narrower_configs(
    whole: PreTrainedModel, stacks: Sequence[Stack], widths: Widths
) -> list[Narrower]:
    """Configs with the widths that were asked for; later ones also state the size of a head.

    whole: the teacher without memory
    raises: InputError where the config has no field for a width, or a width is not possible
    """
    config, changes = copy.deepcopy(whole.config), {}
    ffn_fields = _ffn_fields(whole, stacks)
    ffn_axes = {axis: size for _, axes in ffn_fields.values() for axis, size in axes.items()}
    if widths.ffn is not None and not ffn_fields:
        raise InputError(_no_field(whole, "ffn", "the neurons of its feed-forward networks"))
    for name, (size, _) in ffn_fields.items():
        kept = size if widths.ffn is None else target("ffn", widths.ffn, size)
        if kept != size or getattr(config, name) is None:  # None may mean: four times the width
            setattr(config, name, kept)
        if kept != size:
            changes[name] = (size, kept)
    heads, groups, kept_groups = _set_heads(config, changes, stacks, widths.heads)
    hidden = (hidden_width(whole), hidden_width(whole))
    if widths.hidden is not None:
        # Many configs need a multiple of the heads. A given number is not rounded.
        step = 1
        if isinstance(widths.hidden, float) and heads:
            stack = next(iter(heads))
            step = heads[stack] * kept_groups[stack] // groups[stack]
        kept = target("hidden", widths.hidden, hidden[0], step)
        name = _hidden_field(whole, config, hidden[0], kept)
        setattr(config, name, kept)
        if kept != hidden[0]:
            changes[name] = (hidden[0], kept)
        hidden = (hidden[0], kept)
    plain = Narrower(config, changes, ffn_axes, hidden, heads, groups, kept_groups)
    if not heads or getattr(config, "head_dim", None) is not None:
        return _possible(whole, widths, [plain])
    # Without it the size of a head is hidden / heads, and changes with them.
    stated = copy.deepcopy(config)
    stated.head_dim = hidden[0] // next(iter(heads.values()))
    return _possible(whole, widths, [plain, replace(plain, config=stated)])


def _possible(
    whole: PreTrainedModel, widths: Widths, candidates: Sequence[Narrower]
) -> list[Narrower]:
    """The candidates whose config and model can be made; InputError where there is none."""
    possible, reason = [], ""
    for candidate in candidates:
        try:
            candidate.config.validate()
            blueprint(type(whole), candidate.config)
            possible.append(candidate)
        except Exception as error:  # configs and models refuse widths with errors of any kind
            last_line = str(error).strip().splitlines()[-1].strip()
            reason = reason or last_line.removeprefix("ValueError: ")
    if not possible:
        raise cannot_be_cut(whole, widths, reason)
    return possible


def cannot_be_cut(whole: PreTrainedModel, widths: Widths, reason: str) -> InputError:
    """The error for widths that a model cannot have."""
    return InputError(f"{type(whole).__name__} cannot be cut to {widths}: {reason}")


def _ffn_fields(
    whole: PreTrainedModel, stacks: Sequence[Stack]
) -> dict[str, tuple[int, dict[tuple[str, int], int]]]:
    """By field that decides it: the number of neurons, and the axes of weights that have them."""
    found = {}
    for name, value in whole.config.to_dict().items():
        fits = value is None or (type(value) is int and value > 0)
        if not fits or not any(word in name for word in FFN_NAMES):
            continue
        probed = 8 if value != 8 else 16
        other = copy.deepcopy(whole.config)
        try:
            setattr(other, name, probed)
            built = blueprint(type(whole), other)
        except Exception:  # the model cannot be built with this field, so it is not the one
            continue
        axes = changed_axes(whole, built)
        sizes = {
            old
            for (key, dim), (old, new) in axes.items()
            if new == probed and _is_input(whole, key, dim, stacks)
        }
        if len(sizes) == 1:
            size = sizes.pop()
            found[name] = (size, {axis: old for axis, (old, _) in axes.items()})
    return found


def changed_axes(
    whole: PreTrainedModel, other: PreTrainedModel
) -> dict[tuple[str, int], tuple[int, int]]:
    """(key of a weight, dimension) -> its size in one model and in the other, where they differ."""
    theirs = other.state_dict()
    return {
        (key, dim): (old, new)
        for key, value in whole.state_dict().items()
        if key in theirs and theirs[key].dim() == value.dim()
        for dim, (old, new) in enumerate(zip(value.shape, theirs[key].shape, strict=True))
        if old != new
    }


def _is_input(whole: PreTrainedModel, key: str, dim: int, stacks: Sequence[Stack]) -> bool:
    """Whether an axis is the input of a linear module in a layer."""
    path, _, name = key.rpartition(".")
    inside = any(key.startswith(f"{stack.path}.") for stack in stacks)
    module = whole.get_submodule(path)
    return inside and name == "weight" and is_linear(module) and dim == input_dim(module)


def _set_heads(
    config: PreTrainedConfig,
    changes: dict[str, tuple[int, int]],
    stacks: Sequence[Stack],
    asked: Width | None,
) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Set the numbers of heads; returns heads, groups and kept groups by stack."""
    counts = {
        name: value
        for name, value in config.to_dict().items()
        if "head" in name and type(value) is int and value > 0
        if not any(word in name for word in ("dim", "size"))
    }
    shared = {name: v for name, v in counts.items() if any(word in name for word in SHARED_HEADS)}
    own = {name: v for name, v in counts.items() if name not in shared}
    if not own:
        if asked is not None:
            raise InputError(f"the teacher's {type(config).__name__} has no field for heads")
        return {}, {}, {}
    sharing = next(iter(shared.values()), None)  # groups of heads
    kept = {
        name: value
        if asked is None
        else target("heads", asked, value, step=max(1, value // (sharing or value)))
        for name, value in own.items()
    }
    first = next(iter(own))
    for name, value in shared.items():
        kept[name] = value * kept[first] // own[first]
    for name, value in counts.items():
        if kept[name] != value:
            setattr(config, name, kept[name])
            changes[name] = (value, kept[name])
    of = {s.name: next((name for name in own if s.name in name), first) for s in stacks}
    heads = {stack: own[name] for stack, name in of.items()}
    groups = {stack: sharing or whole for stack, whole in heads.items()}
    return heads, groups, {s: groups[s] * kept[name] // heads[s] for s, name in of.items()}


def _hidden_field(whole: PreTrainedModel, config: PreTrainedConfig, width: int, kept: int) -> str:
    """The field that decides the width of the hidden states."""
    reason = ""
    for name, value in whole.config.to_dict().items():
        if type(value) is not int or value != width:
            continue
        other = copy.deepcopy(config)
        try:
            setattr(other, name, kept)
            built = blueprint(type(whole), other)
        except Exception as error:  # a width that the heads do not divide, or not this field
            reason = f" ({str(error).strip().splitlines()[0].strip()})"
            continue
        if hidden_width(built) == kept:
            return name
    raise InputError(
        f"hidden={kept} is not possible for {type(whole).__name__}{reason}: give a width that its "
        "config accepts with its heads"
    )


def _no_field(whole: PreTrainedModel, name: str, what: str) -> str:
    return (
        f"{name} cannot be cut, since no field of {type(whole.config).__name__} decides {what}: "
        "cut other widths or layers"
    )
