"""The built-in divergences with their derivatives, in closed form.

A built-in divergence is a sum over ids. Two elementwise functions of log_q and log_p (student and
teacher, any shape) describe it:

    v, the summand of an id
    s = dD / d log_q of that id

With q = softmax(z), the derivative of D by the logits z is s - q * sum(s). As a function of q,
s = q * dD/dq; adding a multiple of q to s changes nothing. No form divides by a probability that
may have underflowed.

`tests/losses/test_closed_forms.py` compares each form with autograd in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hf_distill.losses import divergences
from hf_distill.losses.divergences import Divergence

# Allocates memory of a tensor's shape.
New = Callable[[Tensor], Tensor]
Form = Callable[[Tensor, Tensor, Tensor, Tensor, New], tuple[Tensor, Tensor]]


def closed_form(divergence: Divergence) -> Form | None:
    """The form of a divergence with its parameter filled in; None for one that has no form here."""
    name, parameter = divergences.built_in(divergence) or ("", 0.0)
    form = CLOSED_FORMS.get(name)
    if form is None:
        return None
    return partial(form, parameter) if divergences.parameters(name) else form


def value_and_slope(
    divergence: Divergence,
    log_q: Tensor,
    q: Tensor,
    log_p: Tensor,
    p: Tensor,
    new: New = torch.empty_like,
) -> tuple[Tensor, Tensor]:
    """The divergence of each target, (n,), and its slope s, (n, ids).

    A divergence without a closed form, such as a user's own, is differentiated by autograd.

    log_q, q, log_p, p: (n, ids) student and teacher; not changed
    new: allocator for scratch memory
    """
    form = closed_form(divergence)
    if form is not None:
        v, s = form(log_q, q, log_p, p, new)
        return v.sum(-1).clamp_(min=0), s
    leaf = log_q.detach().requires_grad_()
    with torch.enable_grad():
        value = divergence(leaf, log_p)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), slope


def _forward_kl(
    log_q: Tensor, q: Tensor, log_p: Tensor, p: Tensor, new: New
) -> tuple[Tensor, Tensor]:
    v = torch.sub(log_p, log_q, out=new(log_p)).mul_(p)
    return v, torch.neg(p, out=new(p))


def _reverse_kl(
    log_q: Tensor, q: Tensor, log_p: Tensor, p: Tensor, new: New
) -> tuple[Tensor, Tensor]:
    s = torch.sub(log_q, log_p, out=new(log_q)).mul_(q)
    return s, s


def _jsd(
    beta: float, log_q: Tensor, q: Tensor, log_p: Tensor, p: Tensor, new: New
) -> tuple[Tensor, Tensor]:
    log_m = _positive(torch.lerp(q, p, beta, out=new(q))).log_()
    s = torch.sub(log_q, log_m, out=new(log_q)).mul_(q).mul_(1 - beta)
    v = torch.sub(log_p, log_m, out=log_m).mul_(p)
    return torch.add(s, v, alpha=beta, out=v), s


def _skew_forward_kl(
    skew: float, log_q: Tensor, q: Tensor, log_p: Tensor, p: Tensor, new: New
) -> tuple[Tensor, Tensor]:
    m = _positive(torch.lerp(q, p, skew, out=new(q)))
    s = torch.div(p, m, out=new(p)).mul_(q).mul_(skew - 1)  # p / m <= 1 / skew
    return torch.sub(log_p, m.log_(), out=m).mul_(p), s


def _skew_reverse_kl(
    skew: float, log_q: Tensor, q: Tensor, log_p: Tensor, p: Tensor, new: New
) -> tuple[Tensor, Tensor]:
    m = _positive(torch.lerp(p, q, skew, out=new(p)))
    v = torch.log(m, out=new(m))
    v = torch.sub(log_q, v, out=v).mul_(q)
    s = torch.div(q, m, out=m).mul_(q).mul_(-skew).add_(v)  # q / m <= 1 / skew
    return v, s


def _tvd(log_q: Tensor, q: Tensor, log_p: Tensor, p: Tensor, new: New) -> tuple[Tensor, Tensor]:
    half = torch.sub(q, p, out=new(q)).mul_(0.5)
    return torch.abs(half, out=new(half)), half.sign_().mul_(0.5).mul_(q)


def _positive(probabilities: Tensor) -> Tensor:
    """Clamp in place, so that the logarithm is finite where both distributions underflow."""
    return probabilities.clamp_(min=torch.finfo(probabilities.dtype).tiny)


# By the names of `divergences.DIVERGENCES`. The parameter of a divergence that has one comes first.
CLOSED_FORMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "tvd": _tvd,
}
