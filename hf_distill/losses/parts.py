"""The objective over parts of the targets, each with its own signal and divergence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_distill.losses.objective import Objective
from hf_distill.losses.policy_gradient import Draws, drawn_labels, weighted
from hf_distill.losses.signals import Hidden, Logits, Sampled, Signal, TopK
from hf_distill.losses.targets import Targets

RETURNS = "written_returns"


@dataclass(frozen=True)
class Part:
    """Some targets of a batch.

    places: (n,) int64, their places among the batch's targets
    signal: the teacher's at these targets; objective: with the divergence to minimise here
    denominator: the count, among those of the step, by which the logged divergence is divided
    draws: how the loss uses labels that were sampled, if they were
    everywhere: the signal's head is sharded, so all processes evaluate the part at once, also
        those without a target in it
    """

    places: Tensor
    signal: Signal | None
    objective: Objective
    denominator: str
    draws: Draws | None = None
    everywhere: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its losses in the log."""
        returns = self.draws is not None and self.draws.returns
        return (self.objective.name, *((RETURNS,) if returns else ()))


def evaluate_parts(
    parts: Sequence[Part],
    student: Hidden | Logits,
    targets: Targets,
    counts: Mapping[str, Tensor],
    scale: Tensor,
) -> tuple[Tensor, dict[str, tuple[Tensor, str]]]:
    """The objective over all parts, and its values at the targets.

    student: at all targets; the other arguments are those of `Objective`
    returns: 0-dim loss; by name the values times their weights, (targets,) each and zero where a
        target belongs to another part, with the name of their denominator
    """
    losses: list[Tensor] = []
    named: dict[str, tuple[Tensor, str]] = {}
    wanted = [part for part in parts if len(part.places) or part.everywhere] or parts[:1]
    for part in wanted:
        for objective, some, signal in judgements(part, student, targets):
            value = objective(at(student, part.places), some, signal, counts, scale)
            losses.append(value.loss)
            for name, (values, denominator) in objective.weighted(value.per_target, some).items():
                if denominator == "divergence_targets":
                    denominator = part.denominator
                table, _ = named.get(name, (values.new_zeros(len(targets)), ""))
                named[name] = table.index_copy(0, part.places, values), denominator
    judged = {name: part for part in parts if part.objective.alpha > 0 for name in part.names}
    for name, part in judged.items():  # the names of a step must not depend on its batches
        none = torch.zeros(len(targets), device=targets.labels.device)
        named.setdefault(name, (none, part.denominator))
    return torch.stack(losses).sum(), {n: named[n] for n in ("ce", *judged) if n in named}


def judgements(
    part: Part, student: Hidden | Logits, targets: Targets
) -> Iterator[tuple[Objective, Targets, Signal | None]]:
    """The losses that a part adds: objective, its targets, and the signal to follow."""
    some, signal, draws = some_targets(targets, part.places), part.signal, part.draws
    if draws is None or signal is None:
        yield part.objective, some, signal
        return
    objective = part.objective
    drawn = drawn_labels(
        at(student, part.places), signal, some.labels, objective.temperature,
        objective.shared_vocabulary,
    )  # fmt: skip
    if draws.teacher_mix:
        some = weighted(some, drawn.importance(draws.teacher_mix))
    yield objective, some, drawn.signal(drawn.own_advantages()) if draws.token else signal
    if draws.returns:
        signal = drawn.signal(drawn.returns(some.row_of))
        yield replace(objective, name=RETURNS), some, signal


def at(signal: Hidden | Logits | TopK | Sampled, places: Tensor) -> Any:
    """A signal at some of its targets."""
    if isinstance(signal, Hidden):
        states = signal.states.index_select(0, places.to(signal.states.device))
        return Hidden(states, signal.head, signal.gather)
    fields = vars(signal).values()
    return type(signal)(*(value.index_select(0, places.to(value.device)) for value in fields))


def some_targets(targets: Targets, places: Tensor) -> Targets:
    """Some of a batch's targets."""
    ce, divergence = (
        None if weight is None else weight.index_select(0, places)
        for weight in (targets.ce_weight, targets.divergence_weight)
    )
    index, labels = (part.index_select(0, places) for part in (targets.index, targets.labels))
    return Targets(index, labels, targets.shape, ce, divergence)
