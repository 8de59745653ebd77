"""The weights of cross-entropy and divergence, for all targets or for each."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_distill.losses.divergences import Divergence


@dataclass(frozen=True)
class Weights:
    """The contribution of a target: ce * CE + divergence * temperature^2 * D(p^T, q^T).

    ce, divergence: one number for all targets, or (targets, 1), one for each
    function: D, over the first `shared` ids; CE is over all ids of the student
    """

    ce: float | Tensor
    divergence: float | Tensor
    temperature: float
    function: Divergence
    shared: int

    def __getitem__(self, rows: slice) -> Weights:
        """The weights of some targets."""
        if not isinstance(self.ce, Tensor) and not isinstance(self.divergence, Tensor):
            return self
        return replace(self, ce=_part(self.ce, rows), divergence=_part(self.divergence, rows))

    def to(self, dtype: torch.dtype) -> Weights:
        """The same with weights for each target in this dtype."""
        ce, divergence = (
            weight.to(dtype) if isinstance(weight, Tensor) else weight
            for weight in (self.ce, self.divergence)
        )
        return replace(self, ce=ce, divergence=divergence)


def weighted_sum(values: Tensor, weight: float | Tensor, dtype: torch.dtype) -> Tensor:
    """sum_t weight_t * value_t, accumulated in `dtype`. values: (targets,); weight: see above."""
    if isinstance(weight, Tensor):
        return (values.to(dtype) * weight[:, 0].to(dtype)).sum()
    return weight * values.sum(dtype=dtype)


def _part(weight: float | Tensor, rows: slice) -> float | Tensor:
    return weight[rows] if isinstance(weight, Tensor) else weight
