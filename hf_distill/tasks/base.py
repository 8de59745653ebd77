"""The interface of a task.

Everything else (cross-entropy, temperature, divergence, counting, evaluation by row) is the same
code for all tasks. To add one, subclass `Task` and list it in `tasks.find`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from hf_distill.losses.targets import WEIGHTS, Targets, count_by_row, index_of, targets_of

# The entry of a batch with the index of its targets (`training.target_index`).
TARGET_INDEX = "target_index"
# What a batch holds for the objective alone; the forward of a model never sees it.
LABELS = ("labels", "shift_labels", *WEIGHTS, TARGET_INDEX)


class Task(ABC):
    """What a model predicts.

    name: for logs and errors
    reads: the entries of a batch that decide which positions are targets
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ("labels", "shift_labels", "attention_mask")

    @abstractmethod
    def refusal(self, model: Any) -> str | None:
        """Why this model does not fit the task, as the end of a sentence; None if it fits."""

    @abstractmethod
    def labels(self, batch: Mapping[str, Any]) -> Tensor:
        """The label that each position predicts, (rows, positions) int64, `IGNORE` for none."""

    def target_index(self, batch: Mapping[str, Any]) -> Tensor:
        """The places of the targets in (rows * positions), (targets,) int64, ascending.

        On an accelerator the host waits for the device; on the CPU, as in a collator, it costs
        little, and the result serves `targets` wherever the batch has been moved.
        """
        return index_of(self.labels(batch))

    def targets(self, batch: Mapping[str, Any], index: Tensor | None = None) -> Targets:
        """The predicted positions of a batch, with their labels and weights.

        index: the `target_index` of this batch, on its device; by default it is made here
        """
        return targets_of(self.labels(batch), batch, index)

    def counts(self, batch: Mapping[str, Any]) -> Tensor:
        """The counts of `losses.targets.DENOMINATORS` for each row, (rows, counts) int64."""
        return count_by_row(self.labels(batch), batch)

    def model_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The part of a batch that a model's forward may see: all but labels and weights."""
        return {name: value for name, value in batch.items() if name not in LABELS}


def has_labels(batch: Mapping[str, Any]) -> bool:
    """Whether a batch has labels at all."""
    return any(batch.get(name) is not None for name in ("labels", "shift_labels"))
