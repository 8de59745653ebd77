"""A narrower model: fewer neurons, attention heads or features, the least active ones removed.

The activation of a unit is the mean of |value| over the positions of a row (and over the features
of a head), then the L2 norm over the rows. Neurons and heads are ranked in each layer by the input
of the projection that they go into; features by the outputs of the norms, summed over the layers.
Source: Minitron, arXiv:2407.14679.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_distill.errors import InputError
from hf_distill.models.assembly import assembled
from hf_distill.models.calibration import CalibrationRow, run
from hf_distill.models.layer_selection import Stack
from hf_distill.models.narrower_config import (
    Narrower,
    Widths,
    cannot_be_cut,
    hidden_width,
    input_dim,
    is_linear,
    narrower_configs,
)
from hf_distill.models.shorter_config import blueprint, find_stacks
from hf_distill.models.width_axes import (
    HIDDEN,
    Axis,
    find_axes,
    find_norms,
    projections_of,
    reading_modules,
)

# Relative error of the logits of a student, against its teacher without the removed units.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
COARSE = 0.05  # of bfloat16 and float16

Kept = dict[str, list[int]]


@dataclass(frozen=True)
class Cut:
    """What was cut.

    fields: by field of the config that changed, the width before and after
    kept: by what decided it (`width_axes.Axis.choice`), the indices of the units that were kept
    """

    fields: dict[str, tuple[int, int]]
    kept: Kept


def narrower(
    model: PreTrainedModel, widths: Widths, rows: Sequence[CalibrationRow]
) -> tuple[PreTrainedModel, Cut]:
    """A copy of a model with its most active units only, and what was cut.

    raises: InputError where a width is not possible, or a weight cannot be cut to it
    """
    stacks = find_stacks(model)
    whole = blueprint(type(model), model.config)
    norms = find_norms(whole, hidden_width(whole))
    model_training = model.training
    model.eval()
    try:
        reading = reading_modules(model, stacks, norms, rows[0].inputs)
    finally:
        model.train(model_training)
    plan, axes = _plan(whole, widths, stacks, reading)
    choices = {axis.choice: axis for found in axes.values() for axis in found}
    kept = _most_active(model, choices, stacks, norms, rows)
    weights = dict(model.state_dict())
    for key, found in axes.items():
        for axis in found:
            weights[key] = axis.cut(weights[key], kept[axis.choice])
    student = assembled(model, plan.config, weights)
    _check(model, student, axes, kept, norms, stacks, rows[0])
    return student, Cut(plan.changes, kept)


def _plan(
    whole: PreTrainedModel, widths: Widths, stacks: Sequence[Stack], reading: set[str]
) -> tuple[Narrower, dict[str, list[Axis]]]:
    reason = ""
    for candidate in narrower_configs(whole, stacks, widths):
        try:
            outline = blueprint(type(whole), candidate.config)
            return candidate, find_axes(whole, outline, candidate, stacks, reading)
        except Exception as error:  # configs and models refuse widths with errors of any kind
            reason = reason or str(error).strip().splitlines()[-1].strip()
    raise cannot_be_cut(whole, widths, reason)


def _most_active(
    model: PreTrainedModel,
    choices: Mapping[str, Axis],
    stacks: Sequence[Stack],
    norms: Sequence[str],
    rows: Sequence[CalibrationRow],
) -> Kept:
    """The units of each choice with the largest activations, ascending."""
    units: dict[str, int] = {}
    of: dict[str, list[str]] = {}
    for choice, axis in choices.items():
        inside = [n for n in norms if any(n.startswith(f"{stack.path}.") for stack in stacks)]
        of[choice] = inside if choice == HIDDEN else projections_of(choice, stacks, model)
        units |= dict.fromkeys(of[choice], axis.units)
    with _activations(model, units, outputs=set(norms)) as squares:
        for row in rows:
            run(model, [row])
    kept = {}
    for choice, axis in choices.items():
        score = torch.stack([squares[path].sqrt() for path in of[choice]]).sum(0)
        ranked = score.sort(descending=True, stable=True).indices[: axis.kept]
        kept[choice] = sorted(ranked.tolist())
    return kept


@contextmanager
def _activations(
    model: PreTrainedModel, units: Mapping[str, int], outputs: set[str]
) -> Iterator[dict[str, Tensor]]:
    """Sums over rows of the squared activation of each unit, by path of a module.

    units: how many units the input of a module has; outputs: modules whose output counts instead
    """
    squares = {path: torch.zeros(count, dtype=torch.float64) for path, count in units.items()}

    def add(path: str, values: Tensor) -> None:
        each = values.detach().abs().unflatten(-1, (units[path], -1)).double()
        squares[path] += each.mean(-1).flatten(0, -2).mean(0).square().cpu()

    def hook(path: str) -> Any:
        def after(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            add(path, out if path in outputs else args[0])

        return after

    handles = [model.get_submodule(path).register_forward_hook(hook(path)) for path in units]
    try:
        yield squares
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _check(
    model: PreTrainedModel,
    student: PreTrainedModel,
    axes: Mapping[str, list[Axis]],
    kept: Kept,
    norms: Sequence[str],
    stacks: Sequence[Stack],
    row: CalibrationRow,
) -> None:
    """Compare the student with the teacher whose removed units are zero, on one row.

    The norms of the hidden states use the kept features only, as the student's do. This detects a
    weight that was cut in a wrong order, and a constant of the model that depends on its width.
    raises: InputError if they differ
    """
    handles = []
    for choice, axis in _projections(axes, stacks, model):
        handles.append(
            model.get_submodule(choice[1]).register_forward_pre_hook(
                _zeroing_input(axis, kept[choice[0]])
            )
        )
    if HIDDEN in kept:
        handles += _narrow_hidden(model, student, axes, kept[HIDDEN], norms)
    training = model.training
    model.eval()
    try:
        expected = model(**row.inputs)[0]
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    found = student(**row.inputs)[0]
    exactness = TOLERANCE.get(model.dtype, COARSE)
    if HIDDEN in kept:
        scale = float((found.double() * expected).sum() / expected.double().square().sum())
        if _error(found / scale, expected) <= exactness:
            _undo_scale(student, scale, norms, stacks)
            found = student(**row.inputs)[0]
    error = _error(found, expected)
    if not error <= exactness:
        raise InputError(
            f"{type(model).__name__} cannot be cut this way, since the student differs from the "
            f"teacher without the removed units (logits differ by {error:.1%}): its weights have "
            "another order, or a constant depends on its width; cut other widths or layers"
        )


def _error(found: Tensor, expected: Tensor) -> float:
    """Relative L2 error."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _undo_scale(
    student: PreTrainedModel, scale: float, norms: Sequence[str], stacks: Sequence[Stack]
) -> None:
    """Divide what the output head reads by a constant that depends on the width.

    T5 with tied embeddings multiplies the output of its last norm by width ** -0.5.
    """
    last = [path for path in norms if not any(path.startswith(f"{s.path}.") for s in stacks)][-1:]
    for path in last:
        norm: Any = student.get_submodule(path)
        if getattr(norm, "bias", None) is None and abs(scale - 1) > 1e-6:
            norm.weight.div_(scale)


def _projections(
    axes: Mapping[str, list[Axis]], stacks: Sequence[Stack], model: PreTrainedModel
) -> list[tuple[tuple[str, str], Axis]]:
    """((choice, path of a projection), its axis) for neurons and heads."""
    found = {}
    for each in axes.values():
        for axis in each:
            if axis.choice != HIDDEN:
                for path in projections_of(axis.choice, stacks, model):
                    found[axis.choice, path] = axis
    return list(found.items())


def _zeroing_input(axis: Axis, kept: Sequence[int]) -> Any:
    def zero(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        split = args[0].unflatten(-1, (axis.units, -1))
        mask = torch.zeros(axis.units, 1, dtype=split.dtype, device=split.device)
        mask[list(kept)] = 1
        return ((split * mask).flatten(-2), *args[1:])

    return zero


def _narrow_hidden(
    model: PreTrainedModel,
    student: PreTrainedModel,
    axes: Mapping[str, list[Axis]],
    kept: list[int],
    norms: Sequence[str],
) -> list[Any]:
    """Hooks that zero the removed features where they are written, and leave them out of norms."""
    handles = []

    def norm(path: str) -> Any:
        def narrow(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            wide = torch.zeros_like(out)
            wide[..., kept] = student.get_submodule(path)(args[0][..., kept])
            return wide

        return narrow

    def zero(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        wide = torch.zeros_like(out)
        wide[..., kept] = out[..., kept]
        return wide

    for path, module in model.named_modules():
        cut = [axis.dim for axis in axes.get(f"{path}.weight", ()) if axis.choice == HIDDEN]
        if path in norms and cut:
            handles.append(module.register_forward_hook(norm(path)))
            continue
        writes = 1 - input_dim(module) if is_linear(module) else 1
        if writes in cut and (is_linear(module) or isinstance(module, nn.Embedding)):
            handles.append(module.register_forward_hook(zero))
    return handles
