"""Value and gradient of the objective for a few targets whose logits are at hand.

This is what happens between the matrix products of the fused head (`hf_distill.head`), which
hands over blocks small enough for the processor's cache.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    def value(self, log_q: Tensor) -> Tensor:
        """The estimate of the forward KL, (n,); an estimate may be negative."""
        drawn = log_q.gather(1, self.ids.clamp(min=0))
        return -self.entropy - (self.weights * drawn).sum(-1)

    def slope(self, log_q: Tensor, new: New) -> Tensor:
        """s of `hf_distill.gradients`, (n, ids)."""
        return new(log_q).zero_().scatter_add_(1, self.ids.clamp(min=0), -self.weights)


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
    values = {"ce": _cross_entropy(logits, q, column)}
    if teacher is None:
        gradient = torch.mul(q, weights.ce, out=q if out is None else out)
        return values, _minus_label(gradient, column, weights.ce)
    # D's derivative by z / T meets T^2 / T.
    weight = weights.divergence * temperature
    if temperature == 1.0 and shared == logits.shape[1]:
        log_q = torch.log_softmax(logits, -1, out=new(logits))
        values["divergence"], slope = _compare(log_q, q, teacher, weights, new)
        total = slope.sum(-1, keepdim=True)
        q.mul_(weights.ce - weight * total)
        gradient = torch.add(q, slope, alpha=weight, out=q if out is None else out)
    else:
        log_soft, soft = _soft(logits, weights, new)
        values["divergence"], slope = _compare(log_soft, soft, teacher, weights, new)
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
        values["divergence"] = teacher.value(log_q)
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


def _cross_entropy(logits: Tensor, q: Tensor, column: Tensor) -> Tensor:
    """-log q of the labels, (n,), by way of the likeliest id, whose q has not underflowed."""
    behind = logits.amax(-1, keepdim=True) - logits.gather(1, column)
    return (behind - q.amax(-1, keepdim=True).log())[:, 0]


def _minus_label(gradient: Tensor, column: Tensor, weight: float) -> Tensor:
    return gradient.scatter_add_(1, column, torch.full_like(column, -weight, dtype=gradient.dtype))


def _compare(
    log_q: Tensor, q: Tensor, teacher: Tensor | Sparse | Sampled, weights: Weights, new: New
) -> tuple[Tensor, Tensor]:
    """The divergence, and s of `hf_distill.gradients`, which the caller may write to."""
    if isinstance(teacher, Sampled):
        return teacher.value(log_q), teacher.slope(log_q, new)
    if isinstance(teacher, Sparse):
        return _sparse(log_q, q, teacher, weights.function, new)
    return value_and_slope(weights.function, log_q, q, *_soft(teacher, weights, new), new)


# ---- Sparse teachers ----


def outcomes(log_q: Tensor, teacher: Sparse) -> tuple[Tensor, Tensor]:
    """Student and teacher over the k named outcomes and one for all others, (n, k + 1) each.

    log_q: (n, shared ids) log-probabilities. Autograd can differentiate this.
    """
    _, slots = _slots(teacher)
    log_tail = log_q.scatter(1, slots, -torch.inf).logsumexp(-1, keepdim=True)
    return _outcomes(log_q, log_tail, teacher)


def _outcomes(log_q: Tensor, log_tail: Tensor, teacher: Sparse) -> tuple[Tensor, Tensor]:
    """log_tail: (n, 1), the student's, summed over the ids that are in it: one minus the named
    probabilities would cancel."""
    named, slots = _slots(teacher)
    log_p = _log_probs(teacher)
    of_named = torch.where(named, log_q.gather(1, slots), log_p[:, :-1])
    return torch.cat([of_named, log_tail.clamp(min=LEAST)], -1), log_p


def _sparse(
    log_q: Tensor, q: Tensor, teacher: Sparse, divergence: Divergence, new: New
) -> tuple[Tensor, Tensor]:
    """The divergence over these outcomes, and s: what the tail has is shared out as q is there."""
    named, slots = _slots(teacher)
    # Sums of probabilities: a third of logsumexp's time, and what underflows is below LEAST anyway.
    rest = new(q).copy_(q).scatter_(1, slots, 0.0)
    ours, theirs = _outcomes(log_q, rest.sum(-1, keepdim=True).log_(), teacher)
    value, slope = value_and_slope(divergence, ours, ours.exp(), theirs, theirs.exp())
    of_tail = slope[:, -1:] / ours[:, -1:].exp()
    # An unused slot repeats the first id, and so writes the first id's value once more.
    of_named = torch.where(named, slope[:, :-1], slope[:, :1])
    return value, torch.mul(q, of_tail, out=rest).scatter_(1, slots, of_named)


def _slots(teacher: Sparse) -> tuple[Tensor, Tensor]:
    """Which of the k slots are used, and their ids; unused ones point to the first id."""
    named = teacher.ids >= 0
    return named, torch.where(named, teacher.ids, teacher.ids[:, :1])


def _log_probs(teacher: Sparse) -> Tensor:
    """(n, k + 1). An unused slot has so small a probability that it weighs nothing."""
    named = teacher.ids >= 0
    log_probs = teacher.log_probs.masked_fill(~named, LEAST)
    return torch.cat([log_probs, teacher.log_tail[:, None]], -1)
