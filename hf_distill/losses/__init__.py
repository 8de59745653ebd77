"""The objective: divergences, targets, signals, and the fused output head."""

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
from hf_distill.losses.objective import Objective, Term

__all__ = [
    "DIVERGENCES",
    "Divergence",
    "Objective",
    "Term",
    "forward_kl",
    "jsd",
    "named_divergence",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "tvd",
]
