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
    labels = batch["labels"]
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)


def target_mask(batch: Mapping[str, Any]) -> Tensor:
    """(rows, positions) bool: True where a token is predicted."""
    return target_labels(batch) != IGNORE


def count(batches: Sequence[Mapping[str, Any]]) -> Tensor:
    """Targets, attended positions and rows of some batches, in the order of ``DENOMINATORS``.

    returns: (3,) int64, on the device of the batches
    """
    totals = []
    for batch in batches:
        labels = target_labels(batch)
        mask = batch.get("attention_mask")
        attended = labels.new_tensor(labels.numel()) if mask is None else (mask != 0).sum()
        rows = labels.new_tensor(len(labels))
        totals.append(torch.stack([(labels != IGNORE).sum(), attended, rows]))
    return torch.stack(totals).sum(dim=0)
