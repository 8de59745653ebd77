"""Which positions are predicted, and how many there are.

A *target* is a position whose label, after the one causal shift, is not ``IGNORE``. Every number
in this library that is "per target" divides by the count made here, and only here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

IGNORE = -100

DENOMINATORS = ("targets", "attended", "rows")


def target_labels(batch: Mapping[str, Any]) -> Tensor:
    """The label that each position predicts: ``labels`` moved one to the left, or ``shift_labels``.

    batch: ``labels`` (rows, positions), or ``shift_labels`` already aligned by the collator
    returns: (rows, positions) int64, ``IGNORE`` where nothing is predicted
    """
    if batch.get("shift_labels") is not None:
        return batch["shift_labels"]
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
    mask = batch.get("attention_mask")
    if mask is None:
        return labels
    # Padding predicts nothing: in a left-padded row it stands before the first token.
    return labels.masked_fill(mask == 0, IGNORE)


def target_mask(batch: Mapping[str, Any]) -> Tensor:
    """(rows, positions) bool: True where a token is predicted."""
    return target_labels(batch) != IGNORE


def count_by_row(batch: Mapping[str, Any]) -> Tensor:
    """Targets, attended positions and 1 for each row: (rows, 3) int64, as ``DENOMINATORS``."""
    labels = target_labels(batch)
    mask = batch.get("attention_mask")
    attended = torch.ones_like(labels) if mask is None else (mask != 0).to(labels.dtype)
    ones = labels.new_ones(len(labels))
    return torch.stack([(labels != IGNORE).sum(-1), attended.sum(-1), ones], dim=-1)


def count(batches: Sequence[Mapping[str, Any]]) -> Tensor:
    """The same over all rows of some batches: (3,) int64, on their device."""
    return torch.stack([count_by_row(batch).sum(0) for batch in batches]).sum(0)


def accumulator(tensor: Tensor) -> torch.dtype:
    """The dtype for sums over positions: float64 where the device has it.

    One float32 sum over 100M terms was seen to be off in the fourth digit.
    """
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions counted from each row's first attended token, as `generate` counts them.

    Without them a model with absolute positions sees a left-padded row at the wrong places.
    attention_mask: (rows, positions); returns: the same shape, int64
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
