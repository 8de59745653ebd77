"""The objective: divergences, targets, signals, and the fused output head.

forward_kl, reverse_kl, ...   divergences, as functions of log-probabilities
Objective, Term               cross-entropy and divergence as sums; additional terms
Targets, targets_of           the predicted positions of a batch
Logits, Hidden, TopK, Sampled the signals that a teacher may return
LinearHead, fused_loss        the loss at an output head, without whole logits
"""

from hf_distill.losses.divergences import (
    DIVERGENCES,
    Divergence,
    forward_kl,
    jsd,
    named_divergence,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    tvd,
)
from hf_distill.losses.fused_head import fused_loss
from hf_distill.losses.linear_head import LinearHead, LogitTransform
from hf_distill.losses.objective import Objective, Term
from hf_distill.losses.signals import Hidden, Logits, Sampled, Signal, TopK
from hf_distill.losses.targets import IGNORE, Targets, shifted_labels, targets_of
from hf_distill.losses.weights import Weights

__all__ = [
    "DIVERGENCES",
    "IGNORE",
    "Divergence",
    "Hidden",
    "LinearHead",
    "LogitTransform",
    "Logits",
    "Objective",
    "Sampled",
    "Signal",
    "Targets",
    "Term",
    "TopK",
    "Weights",
    "forward_kl",
    "fused_loss",
    "jsd",
    "named_divergence",
    "reverse_kl",
    "shifted_labels",
    "skew_forward_kl",
    "skew_reverse_kl",
    "targets_of",
    "tvd",
]
