"""Map each weight of a student with fewer layers to a weight of its teacher.

Weights are copied by layer index. A selection is refused unless every weight of every chosen layer
has a place in the student, and every layer computes what it computed in the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_distill.models.layer_selection import Stack


class DoesNotFit(Exception):
    """A selection under which a layer would compute something else, with the reason."""


@dataclass(frozen=True)
class Origin:
    """Where a weight of the student comes from.

    key: the teacher's; stack, kept: set where the weight has a slice for each layer along `dim`
    """

    key: str
    dim: int = 0
    layers: int = 0
    kept: tuple[int, ...] = ()

    def __call__(self, source: Mapping[str, Tensor]) -> Tensor:
        weight = source[self.key]
        if not self.kept:
            return weight
        slices = weight.unflatten(self.dim, (self.layers, -1))
        index = [slice(None)] * self.dim + [list(self.kept)]
        return slices[tuple(index)].flatten(self.dim, self.dim + 1)


def plan_layers(
    whole: PreTrainedModel, outline: PreTrainedModel, chosen: Mapping[Stack, list[int]]
) -> dict[str, Origin]:
    """The origin of every weight of the student.

    whole, outline: teacher and student without memory
    raises: DoesNotFit where a weight has no place, or a layer would do something else
    """
    source, wanted = whole.state_dict(), outline.state_dict()
    plan = {key: _origin(key, value, source, chosen) for key, value in wanted.items()}
    if lost := _belonging(source, chosen) - {origin.key for origin in plan.values()}:
        raise DoesNotFit(_another_kind(min(lost), chosen))
    _check_behaviour(whole, outline, chosen)
    _check_attention(whole.config, outline.config)
    return plan


def _origin(
    key: str, value: Tensor, source: Mapping[str, Tensor], chosen: Mapping[Stack, list[int]]
) -> Origin:
    """Where a student's weight comes from.

    A weight that belongs to one index (T5 keeps the relative position bias of all layers in block
    0) comes from the teacher's layer of the same index. A weight outside the layers may have a
    slice for each layer (Gemma's per-layer embeddings).
    """
    for stack, kept in chosen.items():
        if key.startswith(f"{stack.path}."):
            index, _, rest = key.removeprefix(f"{stack.path}.").partition(".")
            moved = f"{stack.path}.{kept[int(index)]}.{rest}"
            found = moved if moved in source else key
            if found not in source or source[found].shape != value.shape:
                raise DoesNotFit(_another_kind(moved, chosen))
            return Origin(found)
    if key in source and source[key].shape == value.shape:
        return Origin(key)
    for stack, kept in chosen.items() if key in source else ():
        theirs, ours = source[key].shape, value.shape
        if len(theirs) != len(ours):
            continue
        differing = [d for d in range(len(theirs)) if theirs[d] != ours[d]]
        dim = differing[0]
        if len(differing) == 1 and theirs[dim] * len(kept) == ours[dim] * stack.length:
            return Origin(key, dim, stack.length, tuple(kept))
    raise DoesNotFit(f"the teacher has no weight of the shape that {key!r} of the student needs")


def _another_kind(key: str, chosen: Mapping[Stack, list[int]]) -> str:
    """Why a weight of a layer has no place, as the beginning of a sentence."""
    for stack, kept in chosen.items():
        if key.startswith(f"{stack.path}."):
            old = int(key.removeprefix(f"{stack.path}.").partition(".")[0])
            new = kept.index(old) if old in kept else None
            return (
                f"layer {old} of the teacher's {stack.name} cannot become layer {new}, since the "
                "index decides what kind of layer it is (its mixture of experts, its attention)"
            )
    return f"the student has no place for the teacher's weight {key!r}"


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
    whole: PreTrainedModel, outline: PreTrainedModel, chosen: Mapping[Stack, list[int]]
) -> None:
    """Refuse a layer that would compute something else, because its index decides what it does."""
    for stack, kept in chosen.items():
        for new, old in enumerate(kept):
            before = whole.get_submodule(f"{stack.path}.{old}")
            after = outline.get_submodule(f"{stack.path}.{new}")
            if before.state_dict().keys() != after.state_dict().keys():
                continue  # holds what its index alone has, see `_origin`
            settings = _settings(before)
            for name, value in _settings(after).items():
                if settings.get(name, value) != value:
                    raise DoesNotFit(
                        f"layer {old} of the teacher's {stack.name} cannot become layer {new}, "
                        f"since its {name} would be {value!r} instead of {settings[name]!r}"
                    )


def _settings(block: nn.Module) -> dict[str, Any]:
    """The numbers and switches that decide what a block computes, by dotted name."""
    return {
        f"{path}.{name}".lstrip("."): value
        for path, module in block.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str | None)
        and not name.startswith(("_", "layer_i"))  # layer_idx, layer_id: its place in the cache
    }


def _check_attention(before: PreTrainedConfig, after: PreTrainedConfig) -> None:
    """Refuse a student of a hybrid model that has no attention layer left: its cache needs one."""

    def attends(config: PreTrainedConfig) -> bool:
        kinds = getattr(config, "layer_types", None) or []
        return any("attention" in kind and "linear" not in kind for kind in map(str, kinds))

    if attends(before) and not attends(after):
        raise DoesNotFit("the student would have no attention layer, which its cache needs")
