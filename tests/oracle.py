"""The objective once more, by another route: float64, probability space, one target at a time.

Rows go through the models alone and unpadded, so that padding, packing, accumulation and
processes have nothing to be wrong about here.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

BETA, SKEW = 0.3, 0.2


def kl(a: Tensor, b: Tensor) -> Tensor:
    return sum((a[i] * (a[i] / b[i]).log() for i in range(len(a))), torch.zeros(()).double())


def divergence(name: str, q: Tensor, p: Tensor) -> Tensor:
    """Student q, teacher p: probabilities of one target, (V,) float64."""
    mixture = BETA * p + (1 - BETA) * q
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: BETA * kl(p, mixture) + (1 - BETA) * kl(q, mixture),
        "skew_forward_kl": lambda: kl(p, SKEW * p + (1 - SKEW) * q),
        "skew_reverse_kl": lambda: kl(q, SKEW * q + (1 - SKEW) * p),
        "tvd": lambda: (p - q).abs().sum() / 2,
        "squared_hellinger": lambda: (p.sqrt() - q.sqrt()).square().sum() / 2,
    }[name]()


def squared_hellinger(student: Tensor, teacher: Tensor) -> Tensor:
    """A divergence of a user's own, on log-probabilities, for the trainer."""
    return 1 - ((student + teacher) / 2).exp().sum(-1)


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    odds = ((logits - logits.max()) / temperature).exp()
    return odds / odds.sum()


def objective(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    documents: list[dict[str, list[int]]],
    *,
    name: str,
    alpha: float,
    temperature: float,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Loss, CE and divergence per target, and the loss's gradient by parameter name."""
    student, teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    total = {"ce": torch.zeros(()).double(), name: torch.zeros(()).double()}
    count = 0
    for document in documents:
        ids = torch.tensor([document["input_ids"]])
        z, w = student(input_ids=ids).logits[0], teacher(input_ids=ids).logits[0].detach()
        shared = min(z.shape[-1], w.shape[-1])
        for position in range(ids.shape[1] - 1):
            label = document["labels"][position + 1]
            if label == -100:
                continue
            count += 1
            total["ce"] = total["ce"] - probabilities(z[position], 1.0)[label].log()
            q = probabilities(z[position, :shared], temperature)
            p = probabilities(w[position, :shared], temperature)
            total[name] = total[name] + divergence(name, q, p)
    loss = ((1 - alpha) * total["ce"] + alpha * temperature**2 * total[name]) / count
    loss.backward()
    gradient = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    values = {"loss": loss.item(), **{k: v.item() / count for k, v in total.items()}}
    return values, gradient
