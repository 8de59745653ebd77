"""Logits, labels and weights for one call of a kernel, and what float64 makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_distill.losses.divergences import named_divergence
from hf_distill.losses.kernels.interface import Kernel
from hf_distill.losses.linear_head import LogitTransform
from hf_distill.losses.objective import plain_loss
from hf_distill.losses.signals import Logits, Sampled, TopK
from hf_distill.losses.weights import Weights

# In float16 small gradients underflow; the fused head scales them by this too.
FACTOR = {torch.float32: 1.0, torch.bfloat16: 1.0, torch.float16: 256.0}
# Norm of the error over the norm of the gradient, which is stored in this dtype. Triton's
# interpreter cuts bfloat16 off where a card rounds it.
GRADIENT_ERROR = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 5e-4}
CUT_OFF_ERROR = 8e-3


class KernelCase:
    """Some targets: one vocabulary at T = 1 with one weight, or a shared part of two at another T
    with a weight for each target."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        name: str,
        temperature: float,
        *,
        rows: int,
        ids: int,
        transform: LogitTransform | None = None,
    ) -> None:
        self.device, self.dtype, self.rows, self.ids = device, dtype, rows, ids
        self.shared = ids if temperature == 1.0 else ids - 5
        self.transform = transform or LogitTransform()
        self.logits = self.padded(3 * self.normal(rows, ids))
        self.labels = torch.randint(0, self.shared, (rows,), device=device)
        weights: Any = (0.4, 0.6)
        if temperature != 1.0:
            weights = [torch.rand(rows, 1, device=device) for _ in range(2)]
        function = named_divergence(name, beta=0.3, skew=0.2)
        self.weights = Weights(*weights, temperature, function, self.shared)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device)

    def padded(self, logits: Tensor) -> Tensor:
        """The same in the dtype, each row at a multiple of 64 ids in memory."""
        rows, ids = logits.shape
        memory = torch.empty(rows, -(-ids // 64) * 64, device=self.device, dtype=self.dtype)
        return memory[:, :ids].copy_(logits)

    def live(self) -> Logits:
        """A teacher's logits, near the student's, with more ids than are shared."""
        moved = self.logits[:, : self.shared].float() + self.normal(self.rows, self.shared)
        return Logits(self.padded(torch.cat([moved, self.normal(self.rows, 3)], 1)))

    def top_k(self, k: int = 7) -> TopK:
        """The likeliest ids, in half of the rows one fewer."""
        log_p = torch.log_softmax(3 * self.normal(self.rows, self.shared), -1)
        log_probs, ids = log_p.topk(k)
        ids[::2, -1] = -1
        tail = log_p.exp().sum(-1) - (log_probs.exp() * (ids >= 0)).sum(-1)
        return TopK(ids, log_probs, tail.log())

    def draws(self, most: int = 9) -> Sampled:
        """Ids with the share of draws that each has, in half of the rows two fewer."""
        order = torch.rand(self.rows, self.shared, device=self.device).argsort(-1)
        ids, weights = order[:, :most].clone(), torch.rand(self.rows, most, device=self.device)
        ids[::2, -2:], weights[::2, -2:] = -1, 0.0
        entropy = torch.rand(self.rows, device=self.device)
        return Sampled(ids, weights / weights.sum(-1, keepdim=True), entropy)

    def run(
        self, kernel: Kernel, teacher: Any, gradient: bool = True
    ) -> tuple[Mapping[str, Tensor], Tensor]:
        """Values, and the gradient without the factor, in float64."""
        logits = self.padded(self.logits)
        values = kernel(
            logits,
            self.labels,
            teacher,
            self.weights,
            transform=self.transform,
            teacher_transform=self.transform,
            gradient=gradient,
            factor=FACTOR[self.dtype],
        )
        return values, logits.double() / FACTOR[self.dtype]

    def finished(self, product: Tensor) -> Tensor:
        """Logits from the product of a head, as its transform says."""
        scaled, cap = product * self.transform.scale, self.transform.cap
        return scaled if cap is None else cap * torch.tanh(scaled / cap)

    def truth(self, teacher: Any, gradient: bool = True) -> tuple[Mapping[str, Tensor], Tensor]:
        """The same through the plain expression and autograd, in float64."""
        product = self.logits.double().requires_grad_(gradient)
        if isinstance(teacher, Logits):
            teacher = Logits(self.finished(teacher.logits.double()))
        else:
            wide = {k: v.double() for k, v in vars(teacher).items() if v.is_floating_point()}
            teacher = replace(teacher, **wide)
        with torch.set_grad_enabled(gradient):
            weights = self.weights.to(torch.float64)
            loss, values = plain_loss(self.finished(product), self.labels, teacher, weights)
        return values, torch.autograd.grad(loss, product)[0] if gradient else product

    def check(
        self, found: tuple[Mapping[str, Tensor], Tensor], right: tuple[Mapping[str, Tensor], Tensor]
    ) -> None:
        """Same values in float32, same gradient up to the dtype that it is stored in."""
        assert found[0].keys() == right[0].keys()
        for name, values in right[0].items():
            torch.testing.assert_close(
                found[0][name].double(), values.double(), rtol=1e-4, atol=2e-5
            )
        error = (found[1] - right[1]).norm() / right[1].norm()
        limit = GRADIENT_ERROR[self.dtype]
        if self.dtype == torch.bfloat16 and self.device.type == "cpu":
            limit = CUT_OFF_ERROR
        assert error <= limit, float(error)
