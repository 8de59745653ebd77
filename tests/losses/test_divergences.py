"""Properties of the divergences; their values are pinned by the oracle grid."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_distill.errors import InputError
from hf_distill.losses.divergences import DIVERGENCES, forward_kl, jsd, named_divergence, reverse_kl


@st.composite
def pairs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Two batches of log-probabilities, from nearly equal to nearly one-hot."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.integers(1, 4)), draw(st.integers(2, 50))
    scale = draw(st.sampled_from([0.01, 1.0, 30.0]))
    made = [(torch.randn(shape, generator=generator) * scale).log_softmax(-1) for _ in range(2)]
    return made[0], made[1]


@pytest.mark.parametrize("name", DIVERGENCES)
@given(pair=pairs())
def test_zero_at_agreement_and_never_negative(
    name: str, pair: tuple[torch.Tensor, torch.Tensor]
) -> None:
    student, teacher = pair
    divergence = named_divergence(name)
    assert divergence(student, student).abs().max() < 1e-6
    apart = divergence(student, teacher)
    assert apart.shape == student.shape[:-1]
    assert apart.isfinite().all()
    assert apart.min() > -1e-5


@given(pair=pairs())
def test_relations_between_them(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = pair
    torch.testing.assert_close(forward_kl(student, teacher), reverse_kl(teacher, student))
    torch.testing.assert_close(
        jsd(student, teacher, beta=0.2), jsd(teacher, student, beta=0.8), rtol=1e-4, atol=1e-6
    )


def test_unknown_name_is_refused() -> None:
    with pytest.raises(InputError, match="divergence is 'kl'"):
        named_divergence("kl")
