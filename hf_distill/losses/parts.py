"""The objective over targets that are judged apart, each part by its own signal and divergence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_distill.losses.fused_head import LEAST_MEMORY, product_dtype
from hf_distill.losses.objective import Objective
from hf_distill.losses.signals import Hidden, Logits, Sampled, Signal, TopK, whole
from hf_distill.losses.targets import Targets


@dataclass(frozen=True)
class Part:
    """Some targets of a batch.

    places: (n,) int64, their places among the batch's targets
    signal: the teacher's at these targets; objective: with the divergence to minimise here
    denominator: the count, among those of the step, by which the logged divergence is divided
    drawn: the labels were drawn from the student, and only they are judged (see `drawn_tokens`)
    """

    places: Tensor
    signal: Signal | None
    objective: Objective
    denominator: str
    drawn: bool = False


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
    wanted = [part for part in parts if len(part.places)] or parts[:1]
    for part in wanted:
        some, theirs = some_targets(targets, part.places), part.signal
        ours = at(student, part.places)
        if part.drawn and theirs is not None:
            theirs = drawn_tokens(ours, theirs, some.labels, part.objective)
        value = part.objective(ours, some, theirs, counts, scale)
        losses.append(value.loss)
        for name, (values, denominator) in part.objective.weighted(value.per_target, some).items():
            denominator = part.denominator if denominator == "divergence_targets" else denominator
            table, _ = named.get(name, (values.new_zeros(len(targets)), ""))
            named[name] = table.index_copy(0, part.places, values), denominator
    for part in parts:  # the names of a step must not depend on its batches
        if part.objective.alpha > 0:
            none = torch.zeros(len(targets), device=targets.labels.device)
            named.setdefault(part.objective.name, (none, part.denominator))
    names = ["ce", *(part.objective.name for part in parts)]
    return torch.stack(losses).sum(), {name: named[name] for name in names if name in named}


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


@torch.no_grad()
def drawn_tokens(
    student: Hidden | Logits, teacher: Signal, labels: Tensor, objective: Objective
) -> Sampled:
    """A signal whose gradient is that of -(log p(y) - log q(y)) log q(y), the advantage constant.

    p, q: teacher and student at the objective's temperature; y: the labels, (targets,)
    Its value is log q(y) - log p(y), whose mean over y from q is the reverse KL. Of the teacher
    only log p(y) is used.
    """
    log_q, log_p = (
        label_log_probs(signal, labels, objective.temperature, objective.shared_vocabulary)
        for signal in (student, teacher)
    )
    advantage = log_p.to(log_q.device) - log_q
    # The value of the signal is -entropy - weight * log q.
    return Sampled(labels[:, None], advantage[:, None], advantage * (1 - log_q))


def label_log_probs(signal: Signal, labels: Tensor, temperature: float, shared: int) -> Tensor:
    """The log-probabilities of some labels among the first `shared` ids, (targets,).

    signal: logits, or the inputs of an output head; its logits are computed chunk by chunk
    """
    found = [labels.new_zeros(0, dtype=torch.float32)]
    with whole(signal) as known:
        assert isinstance(known, Hidden | Logits)
        if isinstance(known, Hidden):
            known = Hidden(known.states.to(product_dtype(known.states)), known.head)
        size = max(1, LEAST_MEMORY // (8 * shared))
        for start in range(0, len(labels), size):
            part = slice(start, start + size)
            logits = known[part].logits[:, :shared]
            wide = logits if logits.dtype == torch.float64 else logits.float()
            log_probs = torch.log_softmax(wide / temperature, -1)
            found.append(log_probs.gather(1, labels[part, None].to(logits.device))[:, 0])
    return torch.cat([one.to(labels.device) for one in found[1:]] or found)
