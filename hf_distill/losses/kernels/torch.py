"""Value and gradient of the objective for a block of targets, in plain PyTorch.

This is the elementwise work between the matrix products of the fused head (`losses.fused_head`).
For each target, with q = softmax(logits), the value is

    ce = -log q[label],  divergence = D(p^T, q^T) over the shared ids

and the gradient by the logits is that of w_ce * ce + w_divergence * T^2 * divergence.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.losses.closed_forms import New, value_and_slope
from hf_distill.losses.divergences import Divergence
from hf_distill.losses.linear_head import LogitTransform
from hf_distill.losses.signals import Logits, Sampled, TopK
from hf_distill.losses.weights import Weights

# The least log-probability of an outcome for several ids, or of an unused slot. Its probability is
# negligible but still a normal number in float32.
LEAST = -80.0
# A block of logits for one core: most of half a dozen such arrays stay in its caches.
BLOCK_BYTES = 2**20
# Float32 copies of a chunk's logits that exist together where a chunk is one block.
COPIES = 8


class Scratch:
    """Buffers that are reused by every block.

    A CPU's allocator returns tensors of this size to the system when they are freed, and touching
    the pages of new ones costs several times the arithmetic done in them.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.kept: list[Tensor] = []
        self.taken = 0

    def __call__(self, like: Tensor) -> Tensor:
        """Return an uninitialised contiguous buffer of this shape, valid until `reuse`."""
        at, self.taken = self.taken, self.taken + 1
        if at == len(self.kept):
            self.kept.append(torch.empty(0, dtype=self.dtype, device=self.device))
        if self.kept[at].numel() < like.numel():
            self.kept[at] = torch.empty(like.numel(), dtype=self.dtype, device=self.device)
        return self.kept[at][: like.numel()].view(like.shape)

    def reuse(self) -> None:
        """Mark all buffers as free."""
        self.taken = 0


class TorchKernel:
    """The kernel of the fused head in plain PyTorch: every device, every divergence.

    wide: the dtype of its arithmetic; device: of the logits
    """

    def __init__(self, wide: torch.dtype, device: torch.device) -> None:
        self.wide = wide
        self.scratch = Scratch(wide, device)
        # On a CPU, chunks are worked on in blocks, and the scratch memory is that of a block.
        self.extra_bytes = 0 if device.type == "cpu" else COPIES * wide.itemsize

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        teacher: Logits | TopK | Sampled | None,
        weights: Weights,
        *,
        transform: LogitTransform,
        teacher_transform: LogitTransform,
        gradient: bool,
        factor: float = 1.0,
    ) -> Mapping[str, Tensor]:
        """See `kernels.interface.Kernel`."""
        rows = len(logits)
        if logits.device.type == "cpu":  # elsewhere one launch for all rows is faster
            each = round(BLOCK_BYTES / (logits.shape[1] * self.wide.itemsize))
            rows = max(1, each) * torch.get_num_threads()  # a thread works on whole rows
        found = []
        for start in range(0, max(len(logits), 1), max(rows, 1)):
            part = slice(start, start + rows)
            self.scratch.reuse()
            block = transform(self._wide(logits[part]))
            theirs: Tensor | TopK | Sampled | None = None
            if isinstance(teacher, Logits):
                theirs = teacher_transform(self._wide(teacher.logits[part]))
            elif teacher is not None:
                theirs = teacher[part]
            if not gradient:
                found.append(values(block, labels[part], theirs, weights[part], self.scratch))
                continue
            in_place = logits.dtype == self.wide and transform.cap is None
            out = logits[part] if in_place else None
            value, slopes = value_and_gradient(
                block, labels[part], theirs, weights[part], out=out, new=self.scratch
            )
            transform.backward_(slopes, block)
            if factor != 1.0:
                slopes.mul_(factor)
            if slopes is not out:
                logits[part] = slopes
            found.append(value)
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    def _wide(self, logits: Tensor) -> Tensor:
        return logits if logits.dtype == self.wide else self.scratch(logits).copy_(logits)


def value_and_gradient(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor | TopK | Sampled | None,
    weights: Weights,
    *,
    out: Tensor | None = None,
    new: New = torch.empty_like,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the values of each target and the gradient of the weighted loss by the logits.

    logits: (n, ids) float32 or float64; labels: (n,) int64
    teacher: its logits, (n, at least the shared ids), in the same dtype; or a recorded signal
    weights: numbers, or (n, 1) tensors in the dtype of the logits
    out: where to write the gradient; may be the memory of the logits
    new: allocator for scratch memory
    returns: `ce` and, with a teacher, `divergence`, (n,) each; the gradient (n, ids)
    """
    column, temperature, shared = labels[:, None], weights.temperature, weights.shared
    q = torch.softmax(logits, -1, out=new(logits))
    values = {"ce": -_log_at(logits, q, column)[:, 0]}
    if teacher is None:
        gradient = torch.mul(q, weights.ce, out=q if out is None else out)
        return values, _minus_label(gradient, column, weights.ce)
    # dD / d(z / T) times T^2 / T.
    weight = weights.divergence * temperature
    # With T = 1 and one vocabulary, CE and divergence share a softmax.
    alike = temperature == 1.0 and shared == logits.shape[1]
    if isinstance(teacher, TopK | Sampled):
        sparse = partial(_sparse, teacher=teacher, divergence=weights.function, weight=weight)
        if alike:
            values["divergence"], gradient = sparse(logits, q, base=weights.ce, out=out)
        else:
            soft_logits = _shared(logits, weights, new)
            soft = torch.softmax(soft_logits, -1, out=new(soft_logits))
            values["divergence"], part = sparse(soft_logits, soft, base=0.0, out=None)
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
        gradient = _add(q, slope, weight, out=q if out is None else out)
    else:
        log_soft, soft = _soft(logits, weights, new)
        values["divergence"], slope = value_and_slope(
            weights.function, log_soft, soft, *_soft(teacher, weights, new), new
        )
        total = slope.sum(-1, keepdim=True)
        gradient = torch.mul(q, weights.ce, out=q if out is None else out)
        part = gradient[:, :shared]
        _add(part, slope.sub_(soft.mul_(total)), weight, out=part)
    return values, _minus_label(gradient, column, weights.ce)


def values(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor | TopK | Sampled | None,
    weights: Weights,
    new: New = torch.empty_like,
) -> dict[str, Tensor]:
    """Return the same values without a gradient, and those that only evaluation reports.

    With a teacher's logits: `teacher_ce`, over all of its ids, and `top1_agreement`, 1 where
    student and teacher have the same most likely token, else 0.
    """
    shared = weights.shared
    found = {"ce": F.cross_entropy(logits, labels, reduction="none")}
    if teacher is None:
        return found
    log_q = _log_soft(logits, weights, new)
    if isinstance(teacher, Sampled):
        found["divergence"] = teacher.value(log_q.gather(1, teacher.slots))
    elif isinstance(teacher, TopK):
        found["divergence"] = weights.function(*outcomes(log_q, teacher))
    else:
        log_p = _log_soft(teacher, weights, new)
        found["divergence"] = weights.function(log_q, log_p)
        found["teacher_ce"] = F.cross_entropy(teacher, labels, reduction="none")
        same = logits[:, :shared].argmax(-1) == teacher[:, :shared].argmax(-1)
        found["top1_agreement"] = same.to(logits.dtype)
    return found


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
    """log q of a few ids, (n, ids), relative to the most likely id, whose q does not underflow."""
    behind = logits.gather(1, ids) - logits.amax(-1, keepdim=True)
    return behind + q.amax(-1, keepdim=True).log()


def _add(base: Tensor, slope: Tensor, weight: float | Tensor, out: Tensor) -> Tensor:
    """base + weight * slope."""
    if isinstance(weight, Tensor):
        return torch.addcmul(base, slope, weight, out=out)
    return torch.add(base, slope, alpha=weight, out=out)


def _minus_label(gradient: Tensor, column: Tensor, weight: float | Tensor) -> Tensor:
    if isinstance(weight, Tensor):
        return gradient.scatter_add_(1, column, -weight)
    return gradient.scatter_add_(1, column, torch.full_like(column, -weight, dtype=gradient.dtype))


# ---- Sparse teachers: top-k ids with a tail, or sampled ids ----


def outcomes(log_q: Tensor, teacher: TopK) -> tuple[Tensor, Tensor]:
    """Return student and teacher over the k ids and one outcome for all others, (n, k + 1) each.

    log_q: (n, shared ids) log-probabilities. Autograd can differentiate this.
    """
    _, slots = _slots(teacher)
    log_tail = log_q.scatter(1, slots, -torch.inf).logsumexp(-1, keepdim=True)
    return _outcomes(log_q.gather(1, slots), log_tail, teacher)


def _outcomes(log_named: Tensor, log_tail: Tensor, teacher: TopK) -> tuple[Tensor, Tensor]:
    """log_named: (n, k) and log_tail: (n, 1), the student's. The tail is summed over its own ids,
    since one minus the named probabilities would lose precision."""
    log_p = _log_probs(teacher)
    of_named = torch.where(teacher.ids >= 0, log_named, log_p[:, :-1])
    return torch.cat([of_named, log_tail.clamp(min=LEAST)], -1), log_p


def _sparse(
    logits: Tensor,
    q: Tensor,
    *,
    teacher: TopK | Sampled,
    divergence: Divergence,
    base: float | Tensor,
    weight: float | Tensor,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the divergence from a sparse teacher, and base * q + weight * its gradient.

    s of `losses.closed_forms` has its own value at each id of the signal and is proportional to q
    everywhere else. So the gradient is a multiple of q except at those ids.

    logits: (n, ids); q: their softmax, which is overwritten
    base, weight: numbers, or (n, 1)
    out: where to write the gradient by the logits, by default in q
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


def _slots(teacher: TopK) -> tuple[Tensor, Tensor]:
    """Which of the k slots are used, and their ids; unused ones point to the first id."""
    named = teacher.ids >= 0
    return named, torch.where(named, teacher.ids, teacher.ids[:, :1])


def _log_probs(teacher: TopK) -> Tensor:
    """(n, k + 1). The probability of an unused slot is negligible."""
    named = teacher.ids >= 0
    log_probs = teacher.log_probs.masked_fill(~named, LEAST)
    return torch.cat([log_probs, teacher.log_tail[:, None]], -1)
