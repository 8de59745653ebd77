"""What is minimised, as sums that somebody else divides.

For the N targets t of one optimizer step, over all its micro-batches and processes,

    L = 1/N * sum_t [ (1 - alpha) * CE_t + alpha * T^2 * D(p_t^T, q_t^T) ]  +  sum_k w_k * F_k / M_k

with p the teacher, q the student, and x^T = softmax(logits / T) in float32. This module makes the
sums of one micro-batch; the trainer divides them by counts of the whole step. Keeping the two
apart is what makes the gradient independent of how a batch is split.

Source: Hinton et al., arXiv:1503.02531, for the T^2 that keeps the gradient's size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.divergences import Divergence
from hf_distill.targets import accumulator


@dataclass(frozen=True)
class Signal:
    """What a teacher says about the targets of one batch.

    logits: (targets, teacher's vocabulary), in any floating dtype
    """

    logits: Tensor


@dataclass(frozen=True)
class Judgement:
    """The objective over the targets of one micro-batch.

    weighted_sum: 0-dim float64, the sum over targets of the bracket above; carries the gradient
    per_target: (targets,) float32 each, without gradient: the numbers to log and to evaluate
    """

    weighted_sum: Tensor
    per_target: dict[str, Tensor]


@dataclass(frozen=True)
class Term:
    """An additional term w * F / M, as a subclass of the trainer adds it.

    row_sums: (rows,) what each row contributes to F; rows, so that evaluation can drop duplicates
    denominator: the count M that makes it a mean: "targets", "attended" or "rows"
    """

    row_sums: Tensor
    denominator: str = "targets"
    weight: float = 1.0


@dataclass(frozen=True)
class Objective:
    """The weights of cross-entropy and divergence, and the divergence itself.

    name: what the divergence is called in logs
    shared_vocabulary: the first so many ids mean the same to student and teacher; the divergence
        runs over them, the cross-entropy over all of the student's ids (else the logits of ids
        that no token has would stay free, and generation would draw them)
    """

    alpha: float
    temperature: float
    divergence: Divergence
    name: str
    shared_vocabulary: int

    def judge(self, logits: Tensor, labels: Tensor, signal: Signal | None) -> Judgement:
        """Weigh the student's logits at the targets against their labels and the teacher's signal.

        logits: (targets, student's vocabulary); labels: (targets,) int64, none of them ignored
        signal: the teacher on the same targets, or None where only the cross-entropy is wanted
        """
        ce = F.cross_entropy(logits.float(), labels, reduction="none")
        per_target = {"ce": ce}
        weighted = (1 - self.alpha) * precise_sum(ce)
        if signal is not None:
            per_target[self.name] = self._divergence(logits, signal.logits)
            scale = self.alpha * self.temperature**2
            weighted = weighted + scale * precise_sum(per_target[self.name])
        detached = {name: values.detach() for name, values in per_target.items()}
        return Judgement(weighted, detached)

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        shared, temperature = self.shared_vocabulary, self.temperature
        return self.divergence(
            F.log_softmax(student[:, :shared].float() / temperature, dim=-1),
            F.log_softmax(teacher[:, :shared].float() / temperature, dim=-1),
        )

    def compare(self, logits: Tensor, labels: Tensor, signal: Signal) -> dict[str, Tensor]:
        """What evaluation reports beside the objective, (targets,) each.

        teacher_ce: the teacher's own cross-entropy, over all of its ids
        top1_agreement: 1 where student and teacher have the same most likely token, else 0
        """
        shared = self.shared_vocabulary
        same = logits[:, :shared].argmax(-1) == signal.logits[:, :shared].argmax(-1)
        teacher_ce = F.cross_entropy(signal.logits.float(), labels, reduction="none")
        return {"teacher_ce": teacher_ce, "top1_agreement": same.float()}


def precise_sum(values: Tensor) -> Tensor:
    """The sum of all values, accumulated in float64 where the device has it."""
    return values.sum(dtype=accumulator(values))


def sum_by_row(values: Tensor, row_of: Tensor, rows: int) -> Tensor:
    """Sums of per-target values by the row that each target is in, (rows,) float64."""
    sums = torch.zeros(rows, dtype=accumulator(values), device=values.device)
    return sums.index_add_(0, row_of, values.to(sums.dtype))
