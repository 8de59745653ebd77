"""Targets: the predicted positions of a batch, their labels, weights and counts.

A *target* is a position whose label is not `IGNORE`, after the one causal shift where a task has
one. Every figure "per target" in this library divides by the counts made here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORE = -100

# Columns of a data set with one number a row (or a position): how much its targets count.
WEIGHTS = ("ce_weight", "divergence_weight")

# "ce_targets" and "divergence_targets": the targets whose weight is not zero.
DENOMINATORS = ("targets", "attended", "rows", "ce_targets", "divergence_targets")


@dataclass(frozen=True)
class Targets:
    """The targets of one batch, row after row.

    index: (targets,) int64, places in the flattened (rows * positions)
    labels: (targets,) int64; float32 where the student predicts numbers
    shape: rows and positions of the batch
    ce_weight, divergence_weight: (targets,) float32; None where every target counts 1
    """

    index: Tensor
    labels: Tensor
    shape: tuple[int, int]
    ce_weight: Tensor | None = None
    divergence_weight: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)

    def select(self, values: Tensor) -> Tensor:
        """(rows, positions, ...) -> (targets, ...), on the device of the values."""
        return values.flatten(0, 1).index_select(0, self.index.to(values.device))

    @property
    def mask(self) -> Tensor:
        """(rows, positions) bool."""
        flat = torch.zeros(
            self.shape[0] * self.shape[1], dtype=torch.bool, device=self.index.device
        )
        return flat.index_fill_(0, self.index, True).view(self.shape)

    @property
    def row_of(self) -> Tensor:
        """(targets,) int64, the row that each target is in."""
        return torch.div(self.index, max(self.shape[1], 1), rounding_mode="floor")


def index_of(labels: Tensor) -> Tensor:
    """The places of the targets in the flattened labels, (targets,) int64, ascending.

    labels: (rows, positions) int64, the label that each position predicts or `IGNORE`
    On an accelerator the host waits for the device, since the number of targets is a shape.
    """
    return (labels.flatten() != IGNORE).nonzero()[:, 0]


def targets_of(
    labels: Tensor, weights: Mapping[str, Tensor], index: Tensor | None = None
) -> Targets:
    """The targets of a batch.

    labels: (rows, positions), the label that each position predicts or `IGNORE`
    weights: by the names in `WEIGHTS`, (rows,) or (rows, positions) each
    index: what `index_of` gives for these labels, where it is known; on their device
    """
    flat = labels.flatten()
    index = index_of(labels) if index is None else index
    rows, positions = labels.shape
    of_targets = {
        name: _by_position(weight, labels).flatten().index_select(0, index).float()
        for name, weight in weights.items()
    }
    return Targets(index, flat.index_select(0, index), (rows, positions), **of_targets)


def shifted_labels(batch: Mapping[str, Any]) -> Tensor:
    """The label that each position of a causal model predicts.

    batch: `labels` (rows, positions), which are moved one to the left, or `shift_labels` that the
        collator has aligned already; `attention_mask` (rows, positions) if there is padding
    returns: (rows, positions) int64, `IGNORE` where nothing is predicted. A target and the
        position that predicts it are both attended: padding neither predicts nor is predicted,
        regardless of its label, also in left-padded rows
    """
    if batch.get("shift_labels") is not None:
        return batch["shift_labels"]
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return labels
    predicted = torch.nn.functional.pad(mask[:, 1:], (0, 1))
    return labels.masked_fill((mask == 0) | (predicted == 0), IGNORE)


def count_by_row(labels: Tensor, mask: Tensor | None, weights: Mapping[str, Tensor]) -> Tensor:
    """The counts named in `DENOMINATORS` for each row, (rows, 5) int64.

    labels: (rows, positions), the label that each position predicts or `IGNORE`
    mask: the attention mask, (rows, tokens) if it is to be counted; weights: see `targets_of`
    """
    targets = labels != IGNORE
    attended = torch.ones_like(targets)
    if mask is not None and mask.dim() == 2:
        attended = mask != 0
    ones = torch.ones(len(labels), dtype=torch.int64, device=labels.device)
    counts = [targets.sum(-1), attended.sum(-1), ones]
    for name in WEIGHTS:
        weight = weights.get(name)
        counted = targets if weight is None else targets & (_by_position(weight, labels) != 0)
        counts.append(counted.sum(-1))
    return torch.stack(counts, dim=-1)


def total_counts(counts_by_row: Sequence[Tensor]) -> Tensor:
    """The same over all rows of some batches: (5,) int64, on their device."""
    return torch.stack([counts.sum(0) for counts in counts_by_row]).sum(0)


def accumulator(tensor: Tensor) -> torch.dtype:
    """The dtype for sums over positions: float64 where the device has it.

    One float32 sum over 100M terms was seen to be off in the fourth digit.
    """
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def precise_sum(values: Tensor) -> Tensor:
    """The sum of all values, accumulated in float64 where the device has it."""
    return values.sum(dtype=accumulator(values))


def sum_by_row(values: Tensor, row_of: Tensor, rows: int) -> Tensor:
    """Sums of per-target values by the row that each target is in, (rows,) float64."""
    sums = torch.zeros(rows, dtype=accumulator(values), device=values.device)
    return sums.index_add_(0, row_of, values.to(sums.dtype))


def _by_position(weight: Tensor, labels: Tensor) -> Tensor:
    """(rows,) or (rows, positions) -> (rows, positions)"""
    return (weight[:, None] if weight.dim() == 1 else weight).expand_as(labels)
