"""Value and gradient of the objective for a few targets whose logits are at hand.

This is what happens between the matrix products of the fused head (`hf_distill.head`), which
hands over blocks small enough for the processor's cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.divergences import Divergence
from hf_distill.gradients import New, value_and_slope

# The least log-probability of an outcome that stands for several, or for none: it weighs nothing,
# and e to it is a normal number in float32.
LEAST = -80.0


class Scratch:
    """Memory that each block uses again.

    A CPU's allocator hands tensors of this size back to the system as they die, and the pages of
    new ones cost several times the arithmetic that is done in them.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.kept: list[Tensor] = []
        self.taken = 0

    def __call__(self, like: Tensor) -> Tensor:
        """Of this shape, contiguous, with anything in it, until the next `reuse`."""
        at, self.taken = self.taken, self.taken + 1
        if at == len(self.kept):
            self.kept.append(torch.empty(0, dtype=self.dtype, device=self.device))
        if self.kept[at].numel() < like.numel():
            self.kept[at] = torch.empty(like.numel(), dtype=self.dtype, device=self.device)
        return self.kept[at][: like.numel()].view(like.shape)

    def reuse(self) -> None:
        """Nobody looks any longer at what was handed out."""
        self.taken = 0


@dataclass(frozen=True)
class Sparse:
    """A teacher that names some outcomes, and the probability of all others together.

    ids: (targets, k) int64, -1 where a target has fewer than k; the first is always there
    log_probs: (targets, k) at the objective's temperature; log_tail: (targets,), finite
    """

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor

    def __getitem__(self, rows: slice) -> Sparse:
        return Sparse(self.ids[rows], self.log_probs[rows], self.log_tail[rows])


@dataclass(frozen=True)
class Sampled:
    """A teacher of whom some draws are known: unbiased for the forward KL, and for it only.

    ids: (targets, most) int64, -1 beyond a target's own; weights: the same shape, how often each
        id was drawn over the number of draws, 0 where there is none
    entropy: (targets,), of the whole distribution
    Source: RS-KD, arXiv:2503.16870.
    """

    ids: Tensor
    weights: Tensor
    entropy: Tensor

    def __getitem__(self, rows: slice) -> Sampled:
        return Sampled(self.ids[rows], self.weights[rows], self.entropy[rows])

    @property
    def slots(self) -> Tensor:
        """The ids, with some id in the place of none."""
        return self.ids.clamp(min=0)

    def value(self, log_q: Tensor) -> Tensor:
        """The estimate of the forward KL, (n,), which may be negative; log_q: of the slots."""
        return -self.entropy - (self.weights * log_q).sum(-1)


@dataclass(frozen=True)
class Weights:
    """What each target costs: ce * CE + divergence * temperature^2 * D(p^T, q^T).

    D runs over the first `shared` ids, CE over all; see `hf_distill.objective`.
    """

    ce: float
    divergence: float
    temperature: float
    function: Divergence
    shared: int


def judge(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor | Sparse | Sampled | None,
    weights: Weights,
    *,
    out: Tensor | None = None,
    new: New = torch.empty_like,
) -> tuple[dict[str, Tensor], Tensor]:
    """`ce` and, with a teacher, `divergence`, (n,) each; and the cost's gradient by the logits.

    logits: (n, ids) float32 or float64; labels: (n,) int64
    teacher: its logits, (n, at least the shared ids), in the same dtype; or a recorded one
    out: where to put the gradient; may be the logits' own memory
    new: where scratch memory comes from
    returns: values by name, and the gradient (n, ids)
    """
    column, temperature, shared = labels[:, None], weights.temperature, weights.shared
    q = torch.softmax(logits, -1, out=new(logits))
    values = {"ce": -_log_at(logits, q, column)[:, 0]}
    if teacher is None:
        gradient = torch.mul(q, weights.ce, out=q if out is None else out)
        return values, _minus_label(gradient, column, weights.ce)
    # D's derivative by z / T meets T^2 / T.
    weight = weights.divergence * temperature
    alike = temperature == 1.0 and shared == logits.shape[1]
    if isinstance(teacher, Sparse | Sampled):
        named = partial(_named, teacher=teacher, divergence=weights.function, weight=weight)
        if alike:
            values["divergence"], gradient = named(logits, q, base=weights.ce, out=out)
        else:
            soft_logits = _shared(logits, weights, new)
            soft = torch.softmax(soft_logits, -1, out=new(soft_logits))
            values["divergence"], part = named(soft_logits, soft, base=0.0, out=None)
            gradient = torch.mul(q, weights.ce, out=q if out is None else out)
            gradient[:, :shared].add_(part)
        return values, _minus_label(gradient, column, weights.ce)
    if alike:
        log_q = torch.log_softmax(logits, -1, out=new(logits))
        values["divergence"], slope = value_and_slope(
            weights.function, log_q, q, *_soft(teacher, weights, new), new
        )
        total = slope.sum(-1, keepdim=True)
        q.mul_(weights.ce - weight * total)
        gradient = torch.add(q, slope, alpha=weight, out=q if out is None else out)
    else:
        log_soft, soft = _soft(logits, weights, new)
        values["divergence"], slope = value_and_slope(
            weights.function, log_soft, soft, *_soft(teacher, weights, new), new
        )
        total = slope.sum(-1, keepdim=True)
        gradient = torch.mul(q, weights.ce, out=q if out is None else out)
        gradient[:, :shared].add_(slope.sub_(soft.mul_(total)), alpha=weight)
    return values, _minus_label(gradient, column, weights.ce)


def values_only(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor | Sparse | Sampled | None,
    weights: Weights,
    new: New = torch.empty_like,
) -> dict[str, Tensor]:
    """The same values without a gradient; also what evaluation reports beside them.

    With a teacher's logits: `teacher_ce`, over all of its ids, and `top1_agreement`, 1 where both
    find the same token most likely.
    """
    shared = weights.shared
    values = {"ce": F.cross_entropy(logits, labels, reduction="none")}
    if teacher is None:
        return values
    log_q = _log_soft(logits, weights, new)
    if isinstance(teacher, Sampled):
        values["divergence"] = teacher.value(log_q.gather(1, teacher.slots))
    elif isinstance(teacher, Sparse):
        values["divergence"] = weights.function(*outcomes(log_q, teacher))
    else:
        log_p = _log_soft(teacher, weights, new)
        values["divergence"] = weights.function(log_q, log_p)
        values["teacher_ce"] = F.cross_entropy(teacher, labels, reduction="none")
        same = logits[:, :shared].argmax(-1) == teacher[:, :shared].argmax(-1)
        values["top1_agreement"] = same.to(logits.dtype)
    return values


def _soft(logits: Tensor, weights: Weights, new: New) -> tuple[Tensor, Tensor]:
    """Log-probabilities and probabilities at the temperature, over the shared ids."""
    shared = _shared(logits, weights, new)
    # The vectorised softmax is faster than the exponential of what log_softmax gave.
    return (
        torch.log_softmax(shared, -1, out=new(shared)),
        torch.softmax(shared, -1, out=new(shared)),
    )


def _log_soft(logits: Tensor, weights: Weights, new: New) -> Tensor:
    """The first of these alone."""
    shared = _shared(logits, weights, new)
    return torch.log_softmax(shared, -1, out=new(shared))


def _shared(logits: Tensor, weights: Weights, new: New) -> Tensor:
    shared = logits[:, : weights.shared]
    if weights.temperature == 1.0:
        return shared
    return torch.div(shared, weights.temperature, out=new(shared))


def _log_at(logits: Tensor, q: Tensor, ids: Tensor) -> Tensor:
    """log q of a few ids, (n, ids), by way of the likeliest one, whose q has not underflowed."""
    behind = logits.gather(1, ids) - logits.amax(-1, keepdim=True)
    return behind + q.amax(-1, keepdim=True).log()


def _minus_label(gradient: Tensor, column: Tensor, weight: float) -> Tensor:
    return gradient.scatter_add_(1, column, torch.full_like(column, -weight, dtype=gradient.dtype))


# ---- Teachers who name a few ids ----


def outcomes(log_q: Tensor, teacher: Sparse) -> tuple[Tensor, Tensor]:
    """Student and teacher over the k named outcomes and one for all others, (n, k + 1) each.

    log_q: (n, shared ids) log-probabilities. Autograd can differentiate this.
    """
    _, slots = _slots(teacher)
    log_tail = log_q.scatter(1, slots, -torch.inf).logsumexp(-1, keepdim=True)
    return _outcomes(log_q.gather(1, slots), log_tail, teacher)


def _outcomes(log_named: Tensor, log_tail: Tensor, teacher: Sparse) -> tuple[Tensor, Tensor]:
    """log_named: (n, k) and log_tail: (n, 1), the student's; the tail summed over the ids that are
    in it, as one minus the named probabilities would cancel."""
    log_p = _log_probs(teacher)
    of_named = torch.where(teacher.ids >= 0, log_named, log_p[:, :-1])
    return torch.cat([of_named, log_tail.clamp(min=LEAST)], -1), log_p


def _named(
    logits: Tensor,
    q: Tensor,
    *,
    teacher: Sparse | Sampled,
    divergence: Divergence,
    base: float,
    weight: float,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The divergence from a teacher who names a few ids, and base * q + weight * its gradient.

    s of `hf_distill.gradients` is a number of its own for each named id, and in proportion to q
    for all others, so that the gradient is a multiple of q but for the named ids.

    logits: (n, ids); q: their softmax, which is written over
    out: where to put the gradient by the logits, by default in q
    """
    out = q if out is None else out
    if isinstance(teacher, Sampled):
        value = teacher.value(_log_at(logits, q, teacher.slots))
        drawn = weight * teacher.weights
        torch.mul(q, base + drawn.sum(-1, keepdim=True), out=out)
        return value, out.scatter_add_(1, teacher.slots, -drawn)
    named, slots = _slots(teacher)
    log_named, q_named = _log_at(logits, q, slots), q.gather(1, slots)
    # A sum of probabilities: a third of logsumexp's time; what underflows is below LEAST anyway.
    q_tail = q.scatter_(1, slots, 0.0).sum(-1, keepdim=True)
    ours, theirs = _outcomes(log_named, q_tail.log(), teacher)
    value, slope = value_and_slope(divergence, ours, ours.exp(), theirs, theirs.exp())
    slope, of_tail = slope[:, :-1], slope[:, -1:] / ours[:, -1:].exp()
    total = slope.masked_fill(~named, 0.0).sum(-1, keepdim=True) + q_tail * of_tail
    own = q_named * (base - weight * total) + weight * slope
    # An unused slot repeats the first id, and so writes the first id's value once more.
    own = torch.where(named, own, own[:, :1])
    torch.mul(q, base - weight * total + weight * of_tail, out=out)
    return value, out.scatter_(1, slots, own)


def _slots(teacher: Sparse) -> tuple[Tensor, Tensor]:
    """Which of the k slots are used, and their ids; unused ones point to the first id."""
    named = teacher.ids >= 0
    return named, torch.where(named, teacher.ids, teacher.ids[:, :1])


def _log_probs(teacher: Sparse) -> Tensor:
    """(n, k + 1). An unused slot has so small a probability that it weighs nothing."""
    named = teacher.ids >= 0
    log_probs = teacher.log_probs.masked_fill(~named, LEAST)
    return torch.cat([log_probs, teacher.log_tail[:, None]], -1)
