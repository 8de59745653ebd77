"""A divergence's value together with its gradient, in closed form and in the memory at hand.

A *gradient function* takes, for n targets and S shared ids, what student and teacher say there,

    log_q, q: (n, S) the student's log-probabilities and probabilities
    log_p, p: (n, S) the teacher's

and returns the divergence of each target, (n,), and its derivative by the student's logits (the
ones that q is the softmax of), (n, S). It may overwrite everything but q, and it never divides by
a probability that has underflowed.

Derivation: for D(q) with q = softmax(z), dD/dz = q * (D' - sum(q * D')), where D' = dD/dq up to a
constant. `tests/test_gradients.py` compares each with autograd in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hf_distill import divergences
from hf_distill.divergences import Divergence

Gradient = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def gradient_of(divergence: Divergence) -> Gradient:
    """The closed form of a built-in divergence; autograd for a user's own."""
    function, options = divergence, {}
    if isinstance(divergence, partial) and not divergence.args:
        function, options = divergence.func, divergence.keywords
    if function in CLOSED_FORMS:
        return partial(CLOSED_FORMS[function], **options)
    return partial(by_autograd, divergence)


def by_autograd(
    divergence: Divergence, log_q: Tensor, q: Tensor, log_p: Tensor, p: Tensor
) -> tuple[Tensor, Tensor]:
    """Any divergence of log-probabilities that autograd can differentiate."""
    leaf = log_q.detach().requires_grad_()
    with torch.enable_grad():
        value = divergence(leaf, log_p)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient - q * gradient.sum(-1, keepdim=True)


def _forward_kl(log_q: Tensor, q: Tensor, log_p: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    value = _dot(p, log_p.sub_(log_q))
    return value.clamp_(min=0), torch.sub(q, p, out=p)


def _reverse_kl(log_q: Tensor, q: Tensor, log_p: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    ratio = log_q.sub_(log_p)
    value = _dot(q, ratio)
    return value.clamp_(min=0), ratio.sub_(value[:, None]).mul_(q)


def _jsd(
    log_q: Tensor, q: Tensor, log_p: Tensor, p: Tensor, *, beta: float = 0.5
) -> tuple[Tensor, Tensor]:
    log_m = _log(torch.lerp(q, p, beta))
    of_teacher = _dot(p, log_p.sub_(log_m))
    ratio = log_q.sub_(log_m)
    of_student = _dot(q, ratio)
    value = beta * of_teacher + (1 - beta) * of_student
    return value.clamp_(min=0), ratio.sub_(of_student[:, None]).mul_(q).mul_(1 - beta)


def _skew_forward_kl(
    log_q: Tensor, q: Tensor, log_p: Tensor, p: Tensor, *, skew: float = 0.1
) -> tuple[Tensor, Tensor]:
    m = torch.lerp(q, p, skew).clamp_(min=_tiny(q))
    share = torch.div(p, m, out=log_q)  # p / m <= 1 / skew
    value = _dot(p, log_p.sub_(m.log_()))
    share.sub_(_dot(q, share)[:, None]).mul_(q).mul_(skew - 1)
    return value.clamp_(min=0), share


def _skew_reverse_kl(
    log_q: Tensor, q: Tensor, log_p: Tensor, p: Tensor, *, skew: float = 0.1
) -> tuple[Tensor, Tensor]:
    m = torch.lerp(p, q, skew).clamp_(min=_tiny(q))
    share = torch.div(q, m, out=p)  # q / m <= 1 / skew
    ratio = log_q.sub_(m.log_())
    value = _dot(q, ratio)
    slope = ratio.sub_(share, alpha=skew)
    return value.clamp_(min=0), slope.sub_(_dot(q, slope)[:, None]).mul_(q)


def _tvd(log_q: Tensor, q: Tensor, log_p: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    difference = torch.sub(q, p, out=p)
    value = difference.abs().sum(-1).mul_(0.5)
    sign = difference.sign_().mul_(0.5)
    return value, sign.sub_(_dot(q, sign)[:, None]).mul_(q)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row: sum(a * b)."""
    return (a * b).sum(-1)


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny


def _log(probabilities: Tensor) -> Tensor:
    """In place; finite where both distributions have underflowed, and so weigh nothing."""
    return probabilities.clamp_(min=_tiny(probabilities)).log_()


CLOSED_FORMS: dict[Divergence, Callable[..., tuple[Tensor, Tensor]]] = {
    divergences.forward_kl: _forward_kl,
    divergences.reverse_kl: _reverse_kl,
    divergences.jsd: _jsd,
    divergences.skew_forward_kl: _skew_forward_kl,
    divergences.skew_reverse_kl: _skew_reverse_kl,
    divergences.tvd: _tvd,
}
