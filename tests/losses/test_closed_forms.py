"""Closed forms against autograd in float64, and where probabilities underflow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import oracle
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.losses import divergences
from hf_distill.losses.closed_forms import CLOSED_FORMS, closed_form, value_and_slope
from hf_distill.losses.divergences import Divergence

DIVERGENCES: list[Divergence] = [
    divergences.forward_kl,
    divergences.reverse_kl,
    partial(divergences.jsd, beta=0.3),
    partial(divergences.skew_forward_kl, skew=0.2),
    partial(divergences.skew_reverse_kl, skew=0.2),
    divergences.tvd,
]
IDS = [getattr(d, "func", d).__name__ for d in DIVERGENCES]


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=IDS)
def test_a_closed_form_is_the_derivative(divergence: Divergence) -> None:
    z = torch.randn(5, 13, dtype=torch.float64).mul_(3).requires_grad_()
    log_p = F.log_softmax(torch.randn(5, 13, dtype=torch.float64) * 3, -1)
    expected = divergence(F.log_softmax(z, -1), log_p)
    (slope,) = torch.autograd.grad(expected.sum(), z)
    log_q = F.log_softmax(z.detach(), -1)
    kept = log_q.clone(), log_p.clone()
    value, s = value_and_slope(divergence, log_q, log_q.exp(), log_p, log_p.exp())
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(by_logits(log_q, s), slope)
    torch.testing.assert_close((log_q, log_p), kept, rtol=0, atol=0)  # the caller goes on with them


def by_logits(log_q: Tensor, s: Tensor) -> Tensor:
    return s - log_q.exp() * s.sum(-1, keepdim=True)


def test_every_built_in_divergence_has_a_closed_form() -> None:
    assert set(CLOSED_FORMS) == set(divergences.DIVERGENCES)
    for name in divergences.DIVERGENCES:
        assert closed_form(divergences.named_divergence(name)) is not None
    assert closed_form(oracle.squared_hellinger) is None


def test_a_users_own_equals_its_hand_written_gradient() -> None:
    """Squared Hellinger: D' = -sqrt(p / q) / 2, hence dD/dz = (q * BC - sqrt(p * q)) / 2."""
    log_q = F.log_softmax(torch.randn(4, 9, dtype=torch.float64), -1)
    log_p = F.log_softmax(torch.randn(4, 9, dtype=torch.float64), -1)
    root = ((log_q + log_p) / 2).exp()
    by_hand = (log_q.exp() * root.sum(-1, keepdim=True) - root) / 2
    _, s = value_and_slope(oracle.squared_hellinger, log_q, log_q.exp(), log_p, log_p.exp())
    torch.testing.assert_close(by_logits(log_q, s), by_hand)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=IDS)
@pytest.mark.parametrize("make", [lambda z: z * 1e4, lambda z: z * 0, lambda z: -z.abs() * 1e4])
def test_underflow_makes_no_nan(divergence: Divergence, make: Callable[..., Tensor]) -> None:
    ours, theirs = make(torch.randn(6, 11)), make(torch.randn(6, 11))
    for teacher in (theirs, ours, theirs * 0):
        log_q, log_p = F.log_softmax(ours, -1), F.log_softmax(teacher, -1)
        value, gradient = value_and_slope(divergence, log_q, log_q.exp(), log_p, log_p.exp())
        assert value.isfinite().all()
        assert (value >= 0).all()
        assert gradient.isfinite().all()
