"""Find the dimensions of weights that hold neurons, heads or features, for any architecture.

Units are the neurons of feed-forward networks, groups of attention heads that share a key and a
value, and the features of the hidden states. A weight is cut along every dimension that a narrower
config makes smaller. In a layer, a linear module that reads the hidden states (the output of a
norm, or what the layer was given) maps features to neurons or heads. Any other maps these back: it
is their projection, and its input ranks them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_distill.models.layer_selection import Stack
from hf_distill.models.narrower_config import Narrower, changed_axes, input_dim, is_linear

HIDDEN = "hidden"
SIZE = " (if the size of a head is hidden / heads, cut both in the same proportion)"


class CannotCut(Exception):
    """A weight that cannot be cut, with the reason."""


@dataclass(frozen=True)
class Axis:
    """A dimension of a weight that holds units.

    dim: the dimension; units: how many of them the teacher has; parts: how often they are repeated
        one after the other (the fused query, key and value); kept: how many the student has
    choice: what decides which are kept: the path of a projection, that of a projection in every
        layer of a stack ("encoder.block.*.layer.0..."), or `HIDDEN`
    """

    dim: int
    units: int
    parts: int
    kept: int
    choice: str

    def cut(self, weight: Tensor, indices: Sequence[int]) -> Tensor:
        """The weight with the units of these indices only."""
        split = weight.unflatten(self.dim, (self.parts, self.units, -1))
        index = torch.as_tensor(indices, device=weight.device)
        return split.index_select(self.dim + 1, index).flatten(self.dim, self.dim + 2)


def find_norms(whole: PreTrainedModel, width: int) -> list[str]:
    """Paths of the modules with one weight for each feature of the hidden states."""
    weights = ((path, getattr(m, "weight", None)) for path, m in whole.named_modules())
    return [path for path, w in weights if isinstance(w, Tensor) and w.shape == (width,)]


@torch.no_grad()
def reading_modules(
    model: PreTrainedModel, stacks: Sequence[Stack], norms: Sequence[str], row: Mapping[str, Any]
) -> set[str]:
    """Paths of the linear modules in layers that read the hidden states, seen in one forward."""
    seen: list[Tensor] = []  # kept alive, so that no other tensor takes their memory
    reading: set[str] = set()

    def given(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    def made(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        seen.append(out)

    def reads(path: str) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            if any(args[0].data_ptr() == tensor.data_ptr() for tensor in seen):
                reading.add(path)

        return note

    blocks: Any = [block for stack in stacks for block in _blocks(model, stack)]
    handles = [block.register_forward_pre_hook(given, with_kwargs=True) for block in blocks]
    handles += [model.get_submodule(path).register_forward_hook(made) for path in norms]
    handles += [
        module.register_forward_pre_hook(reads(path))
        for path, module in model.named_modules()
        if is_linear(module) and _stack_of(path, stacks)
    ]
    try:
        model(**row)
    finally:
        for handle in handles:
            handle.remove()
    return reading


def find_axes(
    whole: PreTrainedModel,
    outline: PreTrainedModel,
    narrower: Narrower,
    stacks: Sequence[Stack],
    reading: set[str],
) -> dict[str, list[Axis]]:
    """The axes of every weight that the student has smaller, by key.

    whole, outline: teacher and student without memory
    raises: CannotCut where a weight would have to become smaller in another way
    """
    changed = changed_axes(whole, outline)
    if whole.state_dict().keys() != outline.state_dict().keys():
        raise CannotCut("the student would have other weights than the teacher")
    kinds = {
        (key, dim): _kind(whole, key, dim, old, narrower, stacks, reading)
        for (key, dim), (old, _) in changed.items()
    }
    projections = {
        kind: [k.removesuffix(".weight") for (k, dim), of in kinds.items()
               if of == kind and _is_projection(whole, k, dim)]
        for kind in ("ffn", "heads")
    }  # fmt: skip
    axes: dict[str, list[Axis]] = {}
    for (key, dim), (old, new) in changed.items():
        kind = kinds[key, dim]
        if kind == HIDDEN:
            units, kept = narrower.hidden
            parts, choice = old // units, HIDDEN
        else:
            stack = _stack_of(key, stacks)
            if stack is None or whole.state_dict()[key].dim() > 2:
                raise CannotCut(f"the weight {key!r} has units of several networks at once")
            choice = _nearest(key, projections[kind], stack)
            if kind == "ffn":
                units = narrower.ffn_axes[f"{choice}.weight", _input_of(whole, choice)]
                kept, parts = new * units // old, old // units
            else:
                units = narrower.groups[stack.name]
                kept = narrower.kept_groups[stack.name]
                _check_head_size(whole, choice, narrower, stack, old, new)
                parts = _parts(whole, key, old, choice, units, narrower.heads[stack.name])
        if old % (parts * units) or new * units != old * kept:
            raise CannotCut(
                f"the weight {key!r} would have {new} instead of {old} values in a dimension, "
                f"which is not {kept} of {units} parts of it"
            )
        axes.setdefault(key, []).append(Axis(dim, units, parts, kept, choice))
    _check_asked(changed, kinds, narrower)
    return _shared(axes, whole, stacks)


def _check_asked(
    changed: Mapping[tuple[str, int], Any],
    kinds: Mapping[tuple[str, int], str],
    narrower: Narrower,
) -> None:
    found = set(kinds.values())
    kept = narrower.kept_groups
    asked = {
        HIDDEN: narrower.hidden[0] != narrower.hidden[1],
        "heads": any(kept[stack] != narrower.groups[stack] for stack in kept),
    }
    for kind, cut in asked.items():
        if cut and kind not in found:
            raise CannotCut(f"no weight becomes smaller with {kind} alone{SIZE}")


def _check_head_size(
    whole: PreTrainedModel, choice: str, narrower: Narrower, stack: Stack, old: int, new: int
) -> None:
    """Refuse heads of another size, in models where it is hidden / heads."""
    groups, kept = narrower.groups[stack.name], narrower.kept_groups[stack.name]
    if new * groups == old * kept:
        return
    heads, hidden = narrower.heads[stack.name], narrower.hidden[1]
    projection: Any = whole.get_submodule(choice)
    size = projection.weight.shape[input_dim(projection)] // heads
    fitting = f"a hidden that is a multiple of {size}"
    if hidden % size == 0:
        fitting = f"heads={hidden // size} with hidden={hidden}"
    raise CannotCut(
        f"the size of a head would no longer be {size}, since it is hidden / heads in this model: "
        f"give {fitting}"
    )


def _kind(
    whole: PreTrainedModel,
    key: str,
    dim: int,
    size: int,
    narrower: Narrower,
    stacks: Sequence[Stack],
    reading: set[str],
) -> str:
    """Whether a dimension that becomes smaller holds "ffn", "heads" or `HIDDEN` units."""
    if (key, dim) in narrower.ffn_axes:
        return "ffn"
    if _stack_of(key, stacks) is None:
        return HIDDEN
    path, _, name = key.rpartition(".")
    module = whole.get_submodule(path)
    if not is_linear(module):
        before, after = narrower.hidden
        return HIDDEN if before != after and size == before else "heads"
    is_input = name == "weight" and dim == input_dim(module)
    return HIDDEN if is_input == (path in reading) else "heads"


def _is_projection(whole: PreTrainedModel, key: str, dim: int) -> bool:
    path, _, name = key.rpartition(".")
    module = whole.get_submodule(path)
    return name == "weight" and is_linear(module) and dim == input_dim(module)


def _input_of(whole: PreTrainedModel, path: str) -> int:
    return input_dim(whole.get_submodule(path))


def _parts(
    whole: PreTrainedModel, key: str, size: int, projection: str, groups: int, heads: int
) -> int:
    """How often the groups of heads are repeated in a dimension of a weight."""
    module: Any = whole.get_submodule(projection)
    features = module.weight.shape[input_dim(module)]
    if size in (features, features * groups // heads, heads, groups):
        return 1
    if groups == heads and size % features == 0:
        return size // features
    raise CannotCut(f"the weight {key!r} joins queries, keys and values of different numbers")


def _nearest(key: str, projections: Sequence[str], stack: Stack) -> str:
    """The projection of the network that a weight belongs to, by their names."""
    parts = key.split(".")
    block = len(stack.path.split(".")) + 1

    def common(path: str) -> int:
        pairs = zip(parts, path.split("."), strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(parts))

    ranked = sorted(((common(path), path) for path in projections), reverse=True)
    ranked = [(count, path) for count, path in ranked if count >= block]
    if not ranked or (len(ranked) > 1 and ranked[0][0] == ranked[1][0]):
        raise CannotCut(f"the weight {key!r} has no projection whose input ranks its units")
    return ranked[0][1]


def _shared(
    axes: dict[str, list[Axis]], whole: PreTrainedModel, stacks: Sequence[Stack]
) -> dict[str, list[Axis]]:
    """The same axes, with one choice for a stack where one layer's weight serves the others.

    T5 has the relative position bias of all heads in its first layer.
    """
    keys = whole.state_dict().keys()
    common = set()
    for key, found in axes.items():
        stack = _stack_of(key, stacks)
        for axis in found:
            if stack is None or axis.choice == HIDDEN:
                continue
            others = [_in_block(stack, i, axis.choice) for i in range(stack.length)]
            alike = [_in_block(stack, i, key) for i in range(stack.length)]
            if any(f"{other}.weight" in keys and a not in keys
                   for other, a in zip(others, alike, strict=True)):  # fmt: skip
                common.add(_in_block(stack, "*", axis.choice))

    def choice(axis: Axis) -> Axis:
        stack = _stack_of(axis.choice, stacks)
        together = _in_block(stack, "*", axis.choice) if stack else ""
        if together not in common:
            return axis
        return Axis(axis.dim, axis.units, axis.parts, axis.kept, together)

    return {key: [choice(axis) for axis in found] for key, found in axes.items()}


def projections_of(choice: str, stacks: Sequence[Stack], whole: PreTrainedModel) -> list[str]:
    """The projections whose inputs decide a choice."""
    if "*" not in choice:
        return [choice]
    paths = {path for path, _ in whole.named_modules()}
    stack = _stack_of(choice, stacks)
    assert stack is not None
    found = (_in_block(stack, i, choice) for i in range(stack.length))
    return [path for path in found if path in paths]


def _in_block(stack: Stack | None, index: int | str, path: str) -> str:
    """The same path in another layer of its stack."""
    assert stack is not None
    _, _, rest = path.removeprefix(f"{stack.path}.").partition(".")
    return f"{stack.path}.{index}.{rest}"


def _stack_of(path: str, stacks: Sequence[Stack]) -> Stack | None:
    return next((stack for stack in stacks if path.startswith(f"{stack.path}.")), None)


def _blocks(model: PreTrainedModel, stack: Stack) -> Iterator[nn.Module]:
    blocks: Any = model.get_submodule(stack.path)
    yield from blocks
