"""Choose the layers of a teacher that a student copies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_distill.errors import InputError

INFLUENCE = "influence"
RULES = ("every_other", "first_and_last", INFLUENCE)
COUNTED = ("first_and_last", INFLUENCE)  # these take a number of layers

Layers = str | Sequence[int]


@dataclass(frozen=True)
class Stack:
    """A list of repeated blocks in a model."""

    name: str  # "encoder" or "decoder" where the path says so, otherwise the path
    path: str  # of the nn.ModuleList, as in ``model.get_submodule(path)``
    length: int


def choose_layers(
    stacks: Sequence[Stack],
    layers: Layers | Mapping[str, Layers],
    num_layers: int | None = None,
    influence: Mapping[Stack, Sequence[float]] | None = None,
) -> dict[Stack, list[int]]:
    """The indices that a selection takes from each stack; see `student_from_teacher`.

    influence: a score for each layer, for the rule "influence"
    """
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
    check_num_layers(layers, num_layers)
    return {
        stack: _indices(stack, rules[stack.name], num_layers, (influence or {}).get(stack))
        if stack.name in rules
        else list(range(stack.length))
        for stack in stacks
    }


def check_num_layers(layers: Layers | Mapping[str, Layers] | None, num_layers: int | None) -> None:
    """InputError for a number of layers beside a selection that takes none."""
    rules = list(layers.values()) if isinstance(layers, Mapping) else [layers]
    if num_layers is not None and not any(rule in COUNTED for rule in rules):
        raise InputError(
            f"num_layers={num_layers} has no effect on layers={layers!r}: it is for "
            f"{' and '.join(map(repr, COUNTED))}; leave it out or choose one of these"
        )


def evenly_spaced(first: int, last: int, count: int) -> list[int]:
    """So many indices from the first to the last, both among them where there are two or more."""
    if count < 2:
        return [last] * count
    gaps = count - 1
    return [first + (i * (last - first) + gaps // 2) // gaps for i in range(count)]


def similar_selections(length: int, count: int) -> Iterator[list[int]]:
    """Other selections of as many layers: spaced behind the first few, then runs in a row."""
    for kept in range(count):
        rest = evenly_spaced(kept, length - 1, count - kept)
        if rest == sorted(set(rest)):
            yield [*range(kept), *rest]
    for start in range(length - count + 1):
        yield list(range(start, start + count))


def uses_influence(layers: Layers | Mapping[str, Layers] | None) -> bool:
    """Whether a selection needs the layers' scores."""
    return INFLUENCE in (list(layers.values()) if isinstance(layers, Mapping) else [layers])


def _indices(
    stack: Stack, layers: Layers, num_layers: int | None, influence: Sequence[float] | None
) -> list[int]:
    if layers == "every_other":
        return list(range(0, stack.length, 2))
    if layers == "first_and_last":
        return _first_and_last(stack, num_layers)
    if layers == INFLUENCE:
        return _most_influential(stack, num_layers, influence)
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise InputError(
            f"layers={layers!r} is not a selection: give {', '.join(map(repr, RULES))} or a "
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


def _first_and_last(stack: Stack, num_layers: int | None) -> list[int]:
    count = max(2, (stack.length + 1) // 2) if num_layers is None else num_layers
    if type(count) is not int or not 2 <= count <= stack.length:
        raise InputError(
            f"num_layers={count!r} cannot include the first and last of the {stack.length} layers "
            f"of the teacher's {stack.name}: give 2 to {stack.length}, or list the layers"
        )
    return evenly_spaced(0, stack.length - 1, count)


def _most_influential(
    stack: Stack, num_layers: int | None, influence: Sequence[float] | None
) -> list[int]:
    count = (stack.length + 1) // 2 if num_layers is None else num_layers
    if type(count) is not int or not 1 <= count <= stack.length:
        raise InputError(
            f"num_layers={count!r} cannot be taken from the {stack.length} layers of the teacher's "
            f"{stack.name}: give 1 to {stack.length}"
        )
    if influence is None:
        raise InputError("layers='influence' is measured on rows of text: give rows")
    ranked = sorted(range(stack.length), key=lambda layer: influence[layer], reverse=True)
    return sorted(ranked[:count])
