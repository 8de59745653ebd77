"""The interface of a task.

Everything else (cross-entropy, temperature, divergence, counting, evaluation by row) is the same
code for all tasks. To add one, subclass `Task` and list it in `tasks.find`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from hf_distill.losses.targets import WEIGHTS, Targets, count_by_row, targets_of

# What a batch holds for the objective alone; the forward of a model never sees it.
LABELS = ("labels", "shift_labels", *WEIGHTS)


class Task(ABC):
    """What a model predicts.

    name: for logs and errors
    """

    name: ClassVar[str]

    @abstractmethod
    def refusal(self, model: Any) -> str | None:
        """Why this model does not fit the task, as the end of a sentence; None if it fits."""

    @abstractmethod
    def labels(self, batch: Mapping[str, Any]) -> Tensor:
        """The label that each position predicts, (rows, positions) int64, `IGNORE` for none."""

    def targets(self, batch: Mapping[str, Any]) -> Targets:
        """The predicted positions of a batch, with their labels and weights."""
        return targets_of(self.labels(batch), batch)

    def counts(self, batch: Mapping[str, Any]) -> Tensor:
        """The counts of `losses.targets.DENOMINATORS` for each row, (rows, counts) int64."""
        return count_by_row(self.labels(batch), batch)

    def model_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The part of a batch that a model's forward may see: all but labels and weights."""
        return {name: value for name, value in batch.items() if name not in LABELS}


def has_labels(batch: Mapping[str, Any]) -> bool:
    """Whether a batch has labels at all."""
    return any(batch.get(name) is not None for name in ("labels", "shift_labels"))
