"""The objective: cross-entropy and divergence as sums that the trainer divides.

For the N targets t of one optimizer step, over all its micro-batches and processes,

    L = 1/N * sum_t [ (1 - alpha) * CE_t + alpha * T^2 * D(p_t^T, q_t^T) ]  +  sum_k w_k * F_k / M_k

with p the teacher, q the student, and x^T = softmax(logits / T) in float32. This module makes the
sums of one micro-batch. The trainer divides them by counts of the whole step, which makes the
gradient independent of how a batch is split.

With weights a_t and b_t for each target, the bracket becomes
N/N_a * (1 - alpha) * a_t * CE_t + N/N_b * alpha * T^2 * b_t * D_t, where N_a and N_b count the
targets whose weight is not zero. With weights that are nowhere zero, N_a = N_b = N.

Source: Hinton et al., arXiv:1503.02531, for the factor T^2, which preserves the gradient's scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.losses.divergences import Divergence
from hf_distill.losses.fused_head import fused_loss
from hf_distill.losses.kernels.torch import outcomes
from hf_distill.losses.signals import Hidden, Logits, Sampled, Signal, TopK
from hf_distill.losses.targets import Targets, accumulator
from hf_distill.losses.weights import Weights, weighted_sum


@dataclass(frozen=True)
class ObjectiveValue:
    """The objective over the targets of one micro-batch.

    loss: 0-dim, the sum over targets times the scale; carries the gradient
    per_target: (targets,) each, without gradient and unweighted, for logs and evaluation
    """

    loss: Tensor
    per_target: dict[str, Tensor]


@dataclass(frozen=True)
class Term:
    """An additional term w * F / M of the objective, with the weight w.

    row_sums: (rows,), the contribution of each row to F. By row, so that evaluation can drop
        repeated rows
    denominator: the count M to divide by: "targets", "attended" (positions) or "rows"
    """

    row_sums: Tensor
    denominator: str = "targets"
    weight: float = 1.0


@dataclass(frozen=True)
class Objective:
    """The weights of cross-entropy and divergence, and the divergence itself.

    name: the divergence's name in logs
    shared_vocabulary: number of ids, from 0 on, that are the same tokens in both models. The
        divergence is over these. The cross-entropy is over all of the student's ids; otherwise
        nothing would lower the logits of ids without a token, and generation would sample them
    head_memory_mb: memory for logits in the fused head, see `losses.fused_head.default_memory`
    """

    alpha: float
    temperature: float
    divergence: Divergence
    name: str
    shared_vocabulary: int
    head_memory_mb: float | None = None

    def __call__(
        self,
        student: Hidden | Logits,
        targets: Targets,
        teacher: Signal | None,
        counts: Mapping[str, Tensor],
        scale: Tensor,
    ) -> ObjectiveValue:
        """Evaluate the objective at the targets, times `scale`.

        student: its logits (the plain path), or the inputs of its output head (the fused head)
        teacher: its signal at the same targets; None for the cross-entropy alone
        counts: 0-dim each, the step's "targets", "ce_targets" and "divergence_targets"
        scale: 0-dim, one over the step's "targets", times the number of processes
        Where gradients are off, `teacher_ce` (over all of the teacher's ids) and `top1_agreement`
        (1 where both have the same most likely token, else 0) are among the values.
        """
        weights = self.weights(targets, counts)
        if isinstance(student, Hidden):
            memory = self.head_memory_mb
            loss, values = fused_loss(
                student.states, student.head, targets.labels, teacher, weights,
                scale=scale, memory_mb=memory,
            )  # fmt: skip
        elif targets.labels.is_floating_point():
            loss, values = squared_error(student.logits, targets.labels, teacher, weights)
            loss = loss * scale
        else:
            loss, values = plain_loss(student.logits, targets.labels, teacher, weights)
            loss = loss * scale
        named = {self.name if k == "divergence" else k: v for k, v in values.items()}
        return ObjectiveValue(loss, named)

    def weights(self, targets: Targets, counts: Mapping[str, Tensor]) -> Weights:
        """The weights of these targets: numbers where the batch gives none, else tensors."""
        ce = _weight(1 - self.alpha, targets.ce_weight, counts, "ce_targets")
        divergence = _weight(self.alpha, targets.divergence_weight, counts, "divergence_targets")
        return Weights(ce, divergence, self.temperature, self.divergence, self.shared_vocabulary)

    def weighted(
        self, per_target: Mapping[str, Tensor], targets: Targets
    ) -> dict[str, tuple[Tensor, str]]:
        """Values times their weights, (targets,) each, with the name of their denominator."""
        found = {}
        for name, values in per_target.items():
            of_labels = name in ("ce", "teacher_ce")
            weight = targets.ce_weight if of_labels else targets.divergence_weight
            denominator = "ce_targets" if of_labels else "divergence_targets"
            found[name] = (values if weight is None else values * weight, denominator)
        return found


def plain_loss(
    logits: Tensor, labels: Tensor, teacher: Signal | None, weights: Weights
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted loss and its values from whole logits: the reference implementation.

    logits: (targets, student's ids); labels: (targets,)
    returns: as `losses.fused_head.fused_loss`, with a scale of 1
    """
    shared, temperature, dtype = weights.shared, weights.temperature, accumulator(logits)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    values = {"ce": F.cross_entropy(wide, labels, reduction="none")}
    loss = weighted_sum(values["ce"], weights.ce, dtype)
    if teacher is not None:
        log_q = F.log_softmax(wide[:, :shared] / temperature, dim=-1)
        if isinstance(teacher, Sampled):
            values["divergence"] = teacher.value(log_q.gather(1, teacher.slots))
        elif isinstance(teacher, TopK):
            values["divergence"] = weights.function(*outcomes(log_q, teacher))
        else:
            theirs = teacher.logits.to(wide.device, wide.dtype)
            log_p = F.log_softmax(theirs[:, :shared] / temperature, dim=-1)
            values["divergence"] = weights.function(log_q, log_p)
            if not torch.is_grad_enabled():
                values["teacher_ce"] = F.cross_entropy(theirs, labels, reduction="none")
                same = wide[:, :shared].argmax(-1) == theirs[:, :shared].argmax(-1)
                values["top1_agreement"] = same.float()
        divergence = weighted_sum(values["divergence"], weights.divergence, dtype)
        loss = loss + temperature**2 * divergence
    return loss, {name: value.detach() for name, value in values.items()}


def squared_error(
    predicted: Tensor, labels: Tensor, teacher: Signal | None, weights: Weights
) -> tuple[Tensor, dict[str, Tensor]]:
    """`plain_loss` for numbers: means of normal distributions with variance 1/2.

    Their cross-entropy with a label is the squared error up to a constant. Both KLs between two of
    them, with means divided by T and the result multiplied by T^2, are the squared difference for
    every T.

    predicted: (targets, 1); labels: (targets,); teacher: its numbers as `Logits`
    """
    dtype = accumulator(predicted)
    wide = predicted[:, 0] if predicted.dtype == torch.float64 else predicted[:, 0].float()
    values = {"ce": (wide - labels).square()}
    loss = weighted_sum(values["ce"], weights.ce, dtype)
    if teacher is not None:
        assert isinstance(teacher, Logits)
        theirs = teacher.logits[:, 0].to(wide.dtype)
        difference = (wide - theirs).square()
        values["divergence"] = difference / weights.temperature**2
        loss = loss + weighted_sum(difference, weights.divergence, dtype)
        if not torch.is_grad_enabled():
            values["teacher_ce"] = (theirs - labels).square()
    return loss, {name: value.detach() for name, value in values.items()}


def _weight(
    factor: float, weight: Tensor | None, counts: Mapping[str, Tensor], denominator: str
) -> float | Tensor:
    if weight is None:
        return factor
    ratio = counts["targets"].to(accumulator(weight)) / counts[denominator]
    return (factor * ratio * weight)[:, None]
