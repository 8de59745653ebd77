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

from hf_distill.blocks import Sampled, Sparse, Weights, outcomes
from hf_distill.divergences import Divergence
from hf_distill.head import Head, Signal, fused_loss
from hf_distill.targets import accumulator


@dataclass(frozen=True)
class Judgement:
    """The objective over the targets of one micro-batch.

    loss: 0-dim, the sum over targets of the bracket above times a scale; carries the gradient
    per_target: (targets,) each, without gradient: the numbers to log and to evaluate
    """

    loss: Tensor
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

    def judge(
        self, logits: Tensor, labels: Tensor, signal: Signal | None, scale: Tensor
    ) -> Judgement:
        """Weigh the student's logits at the targets: the plain path, easy to read.

        logits: (targets, student's vocabulary); labels: (targets,) int64, none of them ignored
        signal: the teacher on the same targets, or None where only the cross-entropy is wanted
        scale: 0-dim, what the sum is multiplied by
        Where gradients are off, `teacher_ce` (over all of the teacher's ids) and `top1_agreement`
        (1 where both find the same token most likely, else 0) are told beside the objective.
        """
        shared, temperature = self.shared_vocabulary, self.temperature
        per_target = {"ce": F.cross_entropy(logits.float(), labels, reduction="none")}
        loss = (1 - self.alpha) * precise_sum(per_target["ce"])
        if signal is not None:
            log_q = F.log_softmax(logits[:, :shared].float() / temperature, dim=-1)
            if isinstance(signal, Sampled):
                per_target[self.name] = signal.value(log_q.gather(1, signal.slots))
            elif isinstance(signal, Sparse):
                per_target[self.name] = self.divergence(*outcomes(log_q, signal))
            else:
                theirs = signal.logits.float()
                log_p = F.log_softmax(theirs[:, :shared] / temperature, dim=-1)
                per_target[self.name] = self.divergence(log_q, log_p)
            loss = loss + self.alpha * temperature**2 * precise_sum(per_target[self.name])
            if not torch.is_grad_enabled() and not isinstance(signal, Sparse | Sampled):
                per_target["teacher_ce"] = F.cross_entropy(theirs, labels, reduction="none")
                same = logits[:, :shared].argmax(-1) == theirs[:, :shared].argmax(-1)
                per_target["top1_agreement"] = same.float()
        detached = {name: values.detach() for name, values in per_target.items()}
        return Judgement(loss * scale, detached)

    def judge_fused(
        self,
        hidden: Tensor,
        head: Head,
        labels: Tensor,
        signal: Signal | None,
        scale: Tensor,
        *,
        memory_mb: float | None,
    ) -> Judgement:
        """The same from what goes into the student's output head, without whole logits.

        hidden: (targets, width); memory_mb: what the logits of both models may take at a time
        """
        weights = Weights(
            ce=1 - self.alpha,
            divergence=self.alpha,
            temperature=self.temperature,
            function=self.divergence,
            shared=self.shared_vocabulary,
        )
        loss, values = fused_loss(
            hidden, head, labels, signal, weights, scale=scale, memory_mb=memory_mb
        )
        renamed = {self.name if k == "divergence" else k: v for k, v in values.items()}
        return Judgement(loss, renamed)


def precise_sum(values: Tensor) -> Tensor:
    """The sum of all values, accumulated in float64 where the device has it."""
    return values.sum(dtype=accumulator(values))


def sum_by_row(values: Tensor, row_of: Tensor, rows: int) -> Tensor:
    """Sums of per-target values by the row that each target is in, (rows,) float64."""
    sums = torch.zeros(rows, dtype=accumulator(values), device=values.device)
    return sums.index_add_(0, row_of, values.to(sums.dtype))
