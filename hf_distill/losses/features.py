"""Losses between internal states of student and teacher, as sums over the positions of each row.

Every function takes states of the same rows and positions and a mask, (rows, positions), True where
a position counts. It returns (rows,) sums, in float64 if the device has it. Positions outside the
mask affect neither values nor gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_distill.losses.targets import accumulator


def hidden_cosine(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """1 - cos between hidden states, (rows, positions, width) each.

    Source: DistilBERT, arXiv:1910.01108.
    """
    student, teacher = _exact(student), _exact(teacher)
    return _sum_by_row(1 - F.cosine_similarity(student, teacher, dim=-1), mask)


def hidden_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """The squared difference of hidden states, (rows, positions, width) each, mean over the width.

    Source: TinyBERT, arXiv:1909.10351.
    """
    return _sum_by_row((_exact(student) - _exact(teacher)).square().mean(-1), mask)


def attention_kl(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """KL(teacher || student) of attention maps, mean over heads.

    student, teacher: (rows, heads, positions, positions), each row of a map a distribution
    Source: MiniLM, arXiv:2002.10957, equation 6.
    """
    student, teacher = _exact(student), _exact(teacher)
    # At masked positions both maps are zero.
    smallest = torch.finfo(student.dtype).tiny
    log_ratio = teacher.clamp(min=smallest).log() - student.clamp(min=smallest).log()
    return _sum_by_row((teacher * log_ratio).sum(-1).mean(1), mask)


def relation_kl(student: Tensor, teacher: Tensor, mask: Tensor, heads: int) -> Tensor:
    """KL(teacher || student) of the relations within queries, keys or values, mean over heads.

    The relation of a position is softmax(x x^T / sqrt(d)) over the positions of the mask. Student
    and teacher may have other widths, since both are split into the same number of heads.

    student, teacher: (rows, positions, width); heads: a divisor of both widths
    Source: MiniLMv2, arXiv:2012.15828, equations 4 to 6.
    """
    of_student, of_teacher = (_log_relation(x, mask, heads) for x in (student, teacher))
    p = of_teacher.exp()
    # The log-probability of a position outside the mask is -inf in both.
    difference = torch.where(mask[:, None, None, :], of_teacher - of_student, 0.0)
    return _sum_by_row((p * difference).sum(-1).mean(1), mask)


def _log_relation(states: Tensor, mask: Tensor, heads: int) -> Tensor:
    """(rows, positions, width) -> (rows, heads, positions, positions)"""
    split = _exact(states).unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = split @ split.transpose(-1, -2) / split.shape[-1] ** 0.5
    # A row without any position would be a softmax over nothing; its sum is zero by the mask.
    visible = mask | ~mask.any(-1, keepdim=True)
    return scores.masked_fill(~visible[:, None, None, :], float("-inf")).log_softmax(-1)


def _exact(states: Tensor) -> Tensor:
    """At least float32."""
    return states if states.dtype == torch.float64 else states.float()


def _sum_by_row(values: Tensor, mask: Tensor) -> Tensor:
    """(rows, positions) -> (rows,)"""
    return torch.where(mask, values, 0.0).sum(-1, dtype=accumulator(values))
