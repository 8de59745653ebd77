"""The settings of feature losses: kinds, weights and layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_distill.errors import InputError
from hf_distill.models.layer_selection import Stack
from hf_distill.models.taps import ATTENTION, EMBEDDINGS, HIDDEN

RULES = ("uniform", "last")
PAIRS = "[[student's layer, teacher's layer], ...], counted from 0"


@dataclass(frozen=True)
class Kind:
    """A kind of feature loss.

    what: the place in a model, see `models.taps.Place`; layers: the default
    projected: whether states of another width are projected to the teacher's by learned weights
    """

    what: str
    layers: str = "uniform"
    projected: bool = False


KINDS = {
    "hidden_cosine": Kind(HIDDEN, projected=True),
    "hidden_mse": Kind(HIDDEN, projected=True),
    "embeddings": Kind(EMBEDDINGS, projected=True),
    "attention": Kind(ATTENTION),
    "relations": Kind(ATTENTION, "last"),
}


@dataclass(frozen=True)
class FeatureSetting:
    """The settings of one feature loss.

    layers: a rule, pairs, or one of these for each stack by name
    heads: relation heads; None for as many as the teacher has attention heads
    """

    kind: str
    weight: float
    layers: Any
    heads: int | None = None

    def pairs(self, student: Stack, teacher: Stack) -> list[tuple[int, int]]:
        """The layers that are compared, (student's, teacher's); none in a stack not named."""
        layers = self.layers
        if isinstance(layers, Mapping):
            if student.name not in layers:
                return []
            layers = layers[student.name]
        if KINDS[self.kind].what == EMBEDDINGS:
            return [(0, 0)]
        if layers == "last":
            return [(student.length - 1, teacher.length - 1)]
        if layers == "uniform":
            return _uniform(student, teacher)
        return [self._pair(pair, student, teacher) for pair in layers]

    def _pair(self, pair: Any, student: Stack, teacher: Stack) -> tuple[int, int]:
        for index, stack, role in zip(
            pair, (student, teacher), ("student", "teacher"), strict=True
        ):
            if not 0 <= index < stack.length:
                raise InputError(
                    f"features: {self.kind} names layer {index} of the {role}, whose {stack.name} "
                    f"has the layers 0 to {stack.length - 1}"
                )
        return pair[0], pair[1]


def feature_settings(given: Any) -> list[FeatureSetting]:
    """The feature losses that `DistillationArguments.features` asks for.

    given: None, or for each kind a weight or a mapping {weight, layers, heads}
    raises: InputError for an unknown kind or a wrong value
    """
    if given is None:
        return []
    if not isinstance(given, Mapping):
        raise InputError(
            f'features is {given!r}, but must map kinds to weights, as in {{"hidden_cosine": 1.0}}'
        )
    return [_setting(str(kind), value) for kind, value in given.items()]


def pairs_of(
    setting: FeatureSetting, student: Sequence[Stack], teacher: Sequence[Stack]
) -> list[tuple[Stack, Stack, list[tuple[int, int]]]]:
    """For each pair of stacks the layers that a feature loss compares, (student's, teacher's).

    student, teacher: their stacks. Those of the same name are compared; of models with one stack
        each these, whatever their names
    raises: InputError for layers or stacks that they do not have
    """
    stacks = _stack_pairs(student, teacher)
    found = [(ours, theirs, setting.pairs(ours, theirs)) for ours, theirs in stacks]
    if not any(pairs for _, _, pairs in found):
        raise InputError(
            f"features: layers of {setting.kind} names {', '.join(setting.layers)}, but "
            f"the student has {', '.join(stack.name for stack in student)}"
        )
    return [one for one in found if one[2]]


def _stack_pairs(ours: Sequence[Stack], theirs: Sequence[Stack]) -> list[tuple[Stack, Stack]]:
    if len(ours) == len(theirs) == 1:
        return [(ours[0], theirs[0])]
    by_name = {stack.name: stack for stack in theirs}
    if {stack.name for stack in ours} != by_name.keys():
        raise InputError(
            f"features compare layers of the same stack, but the student has "
            f"{', '.join(stack.name for stack in ours)} and the teacher {', '.join(by_name)}"
        )
    return [(stack, by_name[stack.name]) for stack in ours]


def features_named(given: Any) -> str | None:
    """The feature losses in words, for cards and reports; None where there are none."""
    settings = feature_settings(given)
    words = [
        f"{s.kind} x {s.weight:g}"
        + ("" if KINDS[s.kind].what == EMBEDDINGS else f" (layers {s.layers})")
        for s in settings
    ]
    return ", ".join(words) or None


def _setting(kind: str, value: Any) -> FeatureSetting:
    if kind not in KINDS:
        raise InputError(f"features has {kind!r}, which is none of {', '.join(KINDS)}")
    known = KINDS[kind]
    options = dict(value) if isinstance(value, Mapping) else {"weight": value}
    weight = options.pop("weight", 1.0)
    layers = options.pop("layers", known.layers)
    heads = options.pop("heads", None)
    if options or (heads is not None and kind != "relations"):
        wrong = next(iter(options), "heads")
        takes = ["weight", "layers", *(["heads"] if kind == "relations" else [])]
        raise InputError(f"features: {kind} has no {wrong!r}, only {', '.join(takes)}")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise InputError(f"features: the weight of {kind} is {weight!r}, but must be above 0")
    if heads is not None and (type(heads) is not int or heads < 1):
        raise InputError(f"features: heads of {kind} is {heads!r}, but must be at least 1")
    by_stack = layers.values() if isinstance(layers, Mapping) else [layers]
    if not by_stack or not all(map(_is_layers, by_stack)):
        raise InputError(
            f"features: layers of {kind} is {layers!r}, but must be {', '.join(map(repr, RULES))} "
            f"or pairs {PAIRS}, or one of these for 'encoder' and 'decoder' each"
        )
    return FeatureSetting(kind, float(weight), layers, heads)


def _is_layers(layers: Any) -> bool:
    if isinstance(layers, str):
        return layers in RULES
    return (
        isinstance(layers, Sequence)
        and len(layers) > 0
        and all(
            isinstance(pair, Sequence) and len(pair) == 2 and all(type(i) is int for i in pair)
            for pair in layers
        )
    )


def _uniform(student: Stack, teacher: Stack) -> list[tuple[int, int]]:
    """Each layer of the student with the teacher's at the same relative depth, the last with the
    last. Source: TinyBERT, arXiv:1909.10351, section 3.1."""
    last = [-(-(layer + 1) * teacher.length // student.length) for layer in range(student.length)]
    return [(layer, end - 1) for layer, end in enumerate(last)]
