"""Divergences between a student's and a teacher's distribution, per position, in nats.

A divergence is a function of two arrays of log-probabilities, student first, and is zero where
they agree. The trainer takes any function of this form.

    student, teacher: (..., V) finite float32 log-probabilities, each row summing to one
    returns: (...)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hf_distill.errors import InputError

Divergence = Callable[[Tensor, Tensor], Tensor]


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student): covers every mode of the teacher. Source: arXiv:1503.02531."""
    return (teacher.exp() * (teacher - student)).sum(-1)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher): favours the teacher's main modes. Source: arXiv:2306.08543."""
    return forward_kl(teacher, student)


def _mixture(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """log(weight * exp(a) + (1 - weight) * exp(b)), computed in log space."""
    return torch.logaddexp(a + math.log(weight), b + math.log1p(-weight))


def jsd(student: Tensor, teacher: Tensor, *, beta: float = 0.5) -> Tensor:
    """beta * KL(teacher || m) + (1 - beta) * KL(student || m).

    The generalised Jensen-Shannon divergence, with m = beta * teacher + (1 - beta) * student.
    Source: arXiv:2306.13649.
    """
    mixture = _mixture(teacher, student, beta)
    return beta * forward_kl(mixture, teacher) + (1 - beta) * forward_kl(mixture, student)


def skew_forward_kl(student: Tensor, teacher: Tensor, *, skew: float = 0.1) -> Tensor:
    """KL(teacher || skew * teacher + (1 - skew) * student). Source: DistiLLM, arXiv:2402.03898."""
    return forward_kl(_mixture(teacher, student, skew), teacher)


def skew_reverse_kl(student: Tensor, teacher: Tensor, *, skew: float = 0.1) -> Tensor:
    """KL(student || skew * student + (1 - skew) * teacher). Source: DistiLLM, arXiv:2402.03898."""
    return forward_kl(_mixture(student, teacher, skew), student)


def tvd(student: Tensor, teacher: Tensor) -> Tensor:
    """Total variation distance, half the L1 distance, between 0 and 1. Source: arXiv:2307.15190."""
    return 0.5 * (student.exp() - teacher.exp()).abs().sum(-1)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
}


def parameters(name: str) -> tuple[str, ...]:
    """The parameters of a built-in divergence, which are its keyword-only arguments.

    returns: ("beta",), ("skew",) or ()
    """
    return tuple(DIVERGENCES[name].__kwdefaults__ or ())


def built_in(divergence: Divergence) -> tuple[str, float] | None:
    """The name of a built-in divergence and its parameter; None for a user's own.

    returns: the parameter is `beta` or `skew`, 0.0 for a divergence without one
    """
    function, options = divergence, {}
    if isinstance(divergence, partial) and not divergence.args:
        function, options = divergence.func, divergence.keywords
    for name, known in DIVERGENCES.items():
        if function is known:
            parameters = {**(known.__kwdefaults__ or {}), **options}
            return name, next(iter(parameters.values()), 0.0)
    return None


def named_divergence(name: str, *, beta: float = 0.5, skew: float = 0.1) -> Divergence:
    """The built-in divergence of that name, with its parameter filled in.

    beta: weight of the teacher in ``jsd``; skew: weight of the first argument in the skewed KLs
    raises: InputError for an unknown name
    """
    if name not in DIVERGENCES:
        raise InputError(f"divergence is {name!r}, but must be one of {', '.join(DIVERGENCES)}")
    given = {"beta": beta, "skew": skew}
    options = {key: given[key] for key in parameters(name)}
    return partial(DIVERGENCES[name], **options) if options else DIVERGENCES[name]
