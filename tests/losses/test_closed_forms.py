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

IDS = list(divergences.DIVERGENCES)
DIVERGENCES: list[Divergence] = [
    divergences.named_divergence(name, beta=oracle.BETA, skew=oracle.SKEW) for name in IDS
]


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


@pytest.mark.parametrize("known", [False, True])
def test_a_divergence_without_a_form_goes_through_autograd(
    known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's own, and a built-in one, with a parameter, that has no closed form."""

    def skewed(student: Tensor, teacher: Tensor, *, skew: float = 0.1) -> Tensor:
        return divergences.skew_forward_kl(student, teacher, skew=skew)

    divergence = partial(skewed, skew=0.2)
    if known:
        monkeypatch.setitem(divergences.DIVERGENCES, "skewed", skewed)
        divergence = divergences.named_divergence("skewed", skew=0.2)
    assert divergences.built_in(divergence) == (("skewed", 0.2) if known else None)
    assert closed_form(divergence) is None
    log_q, log_p = (F.log_softmax(torch.randn(4, 9).double(), -1) for _ in range(2))
    found = value_and_slope(divergence, log_q, log_q.exp(), log_p, log_p.exp())
    with_form = partial(divergences.skew_forward_kl, skew=0.2)
    value, s = value_and_slope(with_form, log_q, log_q.exp(), log_p, log_p.exp())
    torch.testing.assert_close(found[0], value)
    torch.testing.assert_close(by_logits(log_q, found[1]), by_logits(log_q, s))


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
