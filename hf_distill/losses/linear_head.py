"""A linear output head as weight and bias, and the model's transform of its logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Logits computed at a time on a CPU in float32. The library's product with a whole transposed
# head takes a quarter longer; narrower dtypes gain nothing from slices.
IDS_PER_SLICE = 512


@dataclass(frozen=True)
class LogitTransform:
    """The transform from the product of a model's head to its logits.

    scale: multiplies it (Cohere's logit_scale, 1 / Granite's logits_scaling)
    cap: c in c * tanh(logits / c), Gemma's final soft-capping
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, product: Tensor) -> Tensor:
        logits = product if self.scale == 1.0 else product * self.scale
        return logits if self.cap is None else (logits / self.cap).tanh_().mul_(self.cap)

    def backward_(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Turn the gradient by the logits into the gradient by the product, in place."""
        if self.cap is not None:
            gradient.mul_((logits / self.cap).square_().neg_().add_(1.0))
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


@dataclass(frozen=True)
class LinearHead:
    """weight: (ids, width); bias: (ids,)"""

    weight: Tensor
    bias: Tensor | None = None
    transform: LogitTransform = LogitTransform()

    def product(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden @ weight.T + bias, all in one dtype, before the transform."""
        if out is None or out.device.type != "cpu" or out.dtype != torch.float32:
            product = torch.mm(hidden, self.weight.t(), out=out)
        else:
            product = out
            for start in range(0, len(self.weight), IDS_PER_SLICE):
                ids = slice(start, start + IDS_PER_SLICE)
                torch.mm(hidden, self.weight[ids].t(), out=out[:, ids])
        return product if self.bias is None else product.add_(self.bias)

    def cast(self, dtype: torch.dtype, ids: int | None = None) -> LinearHead:
        """The same head in another dtype, restricted to its first `ids` rows if given."""
        bias = None if self.bias is None else self.bias[:ids].to(dtype)
        return LinearHead(self.weight[:ids].to(dtype), bias, self.transform)
