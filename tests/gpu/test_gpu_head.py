"""The fused head against whole logits, autograd and wider arithmetic, at real vocabularies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.losses import Hidden, LinearHead, Weights, fused_loss
from hf_distill.losses.divergences import named_divergence
from hf_distill.losses.objective import plain_loss
from hf_distill.losses.signals import Logits

pytestmark = pytest.mark.gpu

# Norm of the error over the norm of the gradient. Products and their factors are in this dtype.
ERROR = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 5e-3}


class Heads:
    """Targets with the heads of a student and of a wider teacher, in one dtype."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, targets: int, ids: int, teacher_ids: int
    ) -> None:
        def make(*shape: int, size: float) -> Tensor:
            return (torch.randn(*shape, device=device) * size).to(dtype)

        self.shared = min(ids, teacher_ids)
        self.hidden = make(targets, 64, size=1.0).requires_grad_()
        self.weight = make(ids, 64, size=0.3).requires_grad_()
        self.bias = make(ids, size=0.3).requires_grad_()
        self.states = make(targets, 96, size=1.0)
        self.teacher_weight = make(teacher_ids, 96, size=0.25)
        self.labels = torch.randint(0, self.shared, (targets,), device=device)
        self.inputs = (self.hidden, self.weight, self.bias)

    def weights(self, name: str, temperature: float) -> Weights:
        return Weights(0.5, 0.5, temperature, named_divergence(name), self.shared)

    def fused(self, weights: Weights) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss, _ = fused_loss(
            self.hidden,
            LinearHead(self.weight, self.bias),
            self.labels,
            Hidden(self.states, LinearHead(self.teacher_weight)),
            weights,
            scale=torch.tensor(1 / len(self.labels), device=self.labels.device).double(),
        )
        return loss.detach(), torch.autograd.grad(loss, self.inputs)

    def plain(self, weights: Weights) -> tuple[Tensor, tuple[Tensor, ...]]:
        """In float32 (float64 would not fit), from the same rounded states and weights."""
        teacher = Logits(F.linear(self.states.float(), self.teacher_weight.float()))
        wide = [tensor.detach().float().requires_grad_() for tensor in self.inputs]
        loss, _ = plain_loss(F.linear(*wide), self.labels, teacher, weights)
        loss = loss / len(self.labels)
        return loss.detach(), torch.autograd.grad(loss, wide)


@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize(
    ("ids", "teacher_ids", "name", "temperature"),
    [
        (50257, 50257, "forward_kl", 1.0),
        (50257, 50000, "jsd", 2.0),
        (151936, 151936, "forward_kl", 1.0),
        (151936, 151665, "reverse_kl", 2.0),
    ],
)
def test_fused_is_plain(
    ids: int,
    teacher_ids: int,
    name: str,
    temperature: float,
    dtype: torch.dtype,
    device: torch.device,
    dry: bool,
) -> None:
    """More targets than one chunk has, and the last chunk not full."""
    targets = 4500 if ids < 100_000 else 2500
    if dry:
        targets, ids, teacher_ids = 50, ids // 500, teacher_ids // 500
    heads = Heads(device, dtype, targets, ids, teacher_ids)
    weights = heads.weights(name, temperature)
    loss, slopes = heads.fused(weights)
    expected, expected_slopes = heads.plain(weights)
    torch.testing.assert_close(loss.double(), expected.double(), rtol=ERROR[dtype], atol=0)
    for found, right in zip(slopes, expected_slopes, strict=True):
        assert found.dtype == dtype
        assert (found.float() - right).norm() <= ERROR[dtype] * right.norm()


def test_values_do_not_depend_on_the_chunks(device: torch.device, dry: bool) -> None:
    heads = Heads(device, torch.float32, 50 if dry else 3000, 100 if dry else 50257, 100)
    weights = heads.weights("forward_kl", 1.0)
    found = []
    for memory_mb in (None, 0.02 if dry else 100.0):
        with torch.no_grad():
            _, values = fused_loss(
                heads.hidden,
                LinearHead(heads.weight, heads.bias),
                heads.labels,
                Hidden(heads.states, LinearHead(heads.teacher_weight)),
                weights,
                scale=torch.ones((), device=device),
                memory_mb=memory_mb,
            )
        found.append(values)
    assert found[0].keys() == {"ce", "divergence", "teacher_ce", "top1_agreement"}
    for name, values in found[0].items():
        torch.testing.assert_close(values, found[1][name], rtol=1e-4, atol=1e-5)
