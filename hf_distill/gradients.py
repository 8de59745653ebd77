"""A divergence's value together with its derivative, in closed form.

A built-in divergence is a sum over ids, and so is described by two functions of log_q and log_p
(student and teacher, any shape), element by element:

    v, what an id adds to the divergence
    s = dD / d log_q of that id

from which the derivative by the logits z that q is the softmax of is s - q * sum(s). For D as a
function of q, s = q * dD/dq, up to a multiple of q, which the second term takes away again. No
form divides by a probability that may have underflowed.

`tests/test_gradients.py` compares each with autograd in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hf_distill import divergences
from hf_distill.divergences import Divergence

Form = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def closed_form(divergence: Divergence) -> Form | None:
    """v and s of a built-in divergence, with its parameter filled in; None for a user's own."""
    function, options = divergence, {}
    if isinstance(divergence, partial) and not divergence.args:
        function, options = divergence.func, divergence.keywords
    form = CLOSED_FORMS.get(function)
    return partial(form, **options) if form is not None else None


def value_and_slope(divergence: Divergence, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence of each target, (n,), and s, (n, ids); a user's own through autograd.

    log_q, log_p: (n, ids) log-probabilities
    """
    form = closed_form(divergence)
    if form is not None:
        v, s = form(log_q, log_p)
        return v.sum(-1).clamp_(min=0), s
    leaf = log_q.detach().requires_grad_()
    with torch.enable_grad():
        value = divergence(leaf, log_p)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), slope


def _forward_kl(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    return (log_p - log_q).mul_(p), p.neg_()


def _reverse_kl(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    s = (log_q - log_p).mul_(log_q.exp())
    return s, s


def _jsd(log_q: Tensor, log_p: Tensor, *, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    q, p = log_q.exp(), log_p.exp()
    log_m = _positive(torch.lerp(q, p, beta)).log_()
    s = (log_q - log_m).mul_(q).mul_(1 - beta)
    return (log_p - log_m).mul_(p).mul_(beta).add_(s), s


def _skew_forward_kl(log_q: Tensor, log_p: Tensor, *, skew: float = 0.1) -> tuple[Tensor, Tensor]:
    q, p = log_q.exp(), log_p.exp()
    m = _positive(torch.lerp(q, p, skew))
    s = (p / m).mul_(q).mul_(skew - 1)  # p / m <= 1 / skew
    return (log_p - m.log()).mul_(p), s


def _skew_reverse_kl(log_q: Tensor, log_p: Tensor, *, skew: float = 0.1) -> tuple[Tensor, Tensor]:
    q, p = log_q.exp(), log_p.exp()
    m = _positive(torch.lerp(p, q, skew))
    v = (log_q - m.log()).mul_(q)
    return v, v - (q / m).mul_(q).mul_(skew)  # q / m <= 1 / skew


def _tvd(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    q = log_q.exp()
    half = (q - log_p.exp()).mul_(0.5)
    return half.abs(), half.sign().mul_(0.5).mul_(q)


def _positive(probabilities: Tensor) -> Tensor:
    """Not zero where both distributions have underflowed, and so weigh nothing."""
    return probabilities.clamp_(min=torch.finfo(probabilities.dtype).tiny)


CLOSED_FORMS: dict[Divergence, Callable[..., tuple[Tensor, Tensor]]] = {
    divergences.forward_kl: _forward_kl,
    divergences.reverse_kl: _reverse_kl,
    divergences.jsd: _jsd,
    divergences.skew_forward_kl: _skew_forward_kl,
    divergences.skew_reverse_kl: _skew_reverse_kl,
    divergences.tvd: _tvd,
}
