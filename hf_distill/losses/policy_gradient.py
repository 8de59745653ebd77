"""Policy-gradient losses on sampled tokens.

p and q are teacher and student. A signal of this module is a `Sampled` of one id a target, whose
gradient is that of -A log q(y) with a constant A, and whose value is -A.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_distill.losses.fused_head import LEAST_MEMORY, product_dtype
from hf_distill.losses.signals import Hidden, Logits, Sampled, Signal, whole
from hf_distill.losses.targets import Targets, accumulator


@dataclass(frozen=True)
class Draws:
    """How the loss of some targets uses that their labels were sampled.

    token: the loss uses the sampled tokens only, each with its advantage log p(y) - log q(y)
    returns: add the loss of whole texts, by the return after each token (MiniLLM, arXiv:2306.08543)
    teacher_mix: the share of p in the distribution that labels were sampled from, 0 to below 1
    """

    token: bool = False
    returns: bool = False
    teacher_mix: float = 0.0


@dataclass(frozen=True)
class DrawnLabels:
    """The labels of some targets and their log-probabilities, (targets,) each, without gradient."""

    labels: Tensor
    log_q: Tensor
    log_p: Tensor

    def signal(self, advantage: Tensor) -> Sampled:
        """The signal of -A log q(y), for advantages A of (targets,)."""
        # Its value is -entropy - weight * log q.
        return Sampled(
            self.labels[:, None], advantage[:, None], (advantage * (1 - self.log_q)).float()
        )

    def own_advantages(self) -> Tensor:
        """log p(y) - log q(y), (targets,): its negative has the reverse KL as its mean over q."""
        return self.log_p - self.log_q

    def returns(self, row_of: Tensor) -> Tensor:
        """The mean of log p - log q over the later targets of the same row, (targets,); else 0.

        The length-normalised return of MiniLLM's equation 8. row_of: (targets,), ascending
        """
        sums = self.own_advantages().to(accumulator(self.log_q)).cumsum(0)
        last = torch.searchsorted(row_of, row_of, right=True) - 1
        later = last - torch.arange(len(row_of), device=row_of.device)
        return ((sums[last] - sums) / later.clamp(min=1)).to(self.log_q.dtype)

    def importance(self, teacher_mix: float) -> Tensor:
        """q(y) over the mixture that y was drawn from, (targets,), at most 1 / (1 - teacher_mix).

        MiniLLM's weight of one token, which stands for the product over the tokens up to it.
        """
        theirs = self.own_advantages().exp()
        return 1 / (teacher_mix * theirs + (1 - teacher_mix))


@torch.no_grad()
def drawn_labels(
    student: Hidden | Logits, teacher: Signal, labels: Tensor, temperature: float, shared: int
) -> DrawnLabels:
    """The log-probabilities that both models give the labels, among the first `shared` ids."""
    log_q, log_p = (
        label_log_probs(signal, labels, temperature, shared) for signal in (student, teacher)
    )
    return DrawnLabels(labels, log_q, log_p.to(log_q.device))


def weighted(targets: Targets, weights: Tensor) -> Targets:
    """Targets whose weights in the divergence are multiplied by (targets,)."""
    known = targets.divergence_weight
    weights = weights.float()
    return replace(targets, divergence_weight=weights if known is None else known * weights)


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
