"""The interface of a task.

Everything else (cross-entropy, temperature, divergence, counting, evaluation by row) is the same
code for all tasks. To add a task, subclass `Task` and list it in `tasks.find`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_distill.errors import InputError
from hf_distill.losses.divergences import Divergence
from hf_distill.losses.targets import WEIGHTS, Targets, count_by_row, index_of, targets_of
from hf_distill.models.base import base_model
from hf_distill.models.runner import ModelRunner
from hf_distill.models.vocabulary import head_rows

# The entry of a batch with the index of its targets (`training.target_index`).
TARGET_INDEX = "target_index"


class Task(ABC):
    """The targets, labels and outcomes of a kind of model.

    A target is an entry of a table (rows, positions). At each target the model has logits over
    outcomes: the ids of a vocabulary, classes, or the positions of a row.

    key: for `task=` and recipes; name: for logs and errors
    fused: the logits come from an output head over a vocabulary, which the fused head replaces
    aligned: positions are those of `input_ids`
    label_names: the entries of a batch that hold labels
    withheld: further entries that a forward does not take
    reads: the entries of a batch that decide which positions are targets
    not_recorded: why a teacher of this task cannot be recorded, as the end of a sentence
    """

    key: ClassVar[str]
    name: ClassVar[str]
    fused: ClassVar[bool] = True
    aligned: ClassVar[bool] = True
    label_names: ClassVar[tuple[str, ...]] = ("labels", "shift_labels")
    withheld: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[tuple[str, ...]] = ("labels", "shift_labels", "attention_mask")
    not_recorded: ClassVar[str | None] = None

    @classmethod
    @abstractmethod
    def refusal(cls, model: Any) -> str | None:
        """Why this model does not fit the task, as the end of a sentence; None if it fits."""

    @classmethod
    def of(cls, model: Any) -> Task:
        """The task of a model that fits it, with what its config says about labels."""
        return cls()

    # ---- Batches ----

    @abstractmethod
    def labels(self, batch: Mapping[str, Any]) -> Tensor:
        """The label that each position predicts, (rows, positions), `IGNORE` for none.

        int64, or for regression float32
        """

    def weights(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The weights of a batch's targets by name, (rows,) or (rows, positions) each."""
        return {name: batch[name] for name in WEIGHTS if batch.get(name) is not None}

    def has_labels(self, batch: Mapping[str, Any]) -> bool:
        """Whether a batch has labels at all."""
        return any(batch.get(name) is not None for name in self.label_names)

    def require_labels(self, batch: Mapping[str, Any]) -> None:
        """InputError for a batch without labels."""
        if not self.has_labels(batch):
            needed = " and ".join(n for n in self.label_names if n != "shift_labels")
            raise InputError(
                f"the batch has no {needed}, only {', '.join(batch)}, but the loss needs labels: "
                "add such a column, or a collator that makes one"
            )

    def given_labels(self, batch: Mapping[str, Any]) -> Any:
        """The labels as `compute_metrics` gets them: a tensor, or a tuple of several."""
        found = tuple(batch[name] for name in self.label_names if batch.get(name) is not None)
        return found[0] if len(found) == 1 else found

    def target_index(self, batch: Mapping[str, Any]) -> Tensor:
        """The places of the targets in (rows * positions), (targets,) int64, ascending.

        On an accelerator the host waits for the device. In a collator, on the CPU, it costs little;
        move the result with the batch and pass it to `targets`.
        """
        return index_of(self.labels(batch))

    def targets(self, batch: Mapping[str, Any], index: Tensor | None = None) -> Targets:
        """The predicted positions of a batch, with their labels and weights.

        index: the `target_index` of this batch, on its device; by default it is made here
        """
        return targets_of(self.labels(batch), self.weights(batch), index)

    def counts(self, batch: Mapping[str, Any]) -> Tensor:
        """The counts of `losses.targets.DENOMINATORS` for each row, (rows, counts) int64."""
        mask = batch.get("attention_mask")
        if mask is None and "input_ids" in batch:  # all are attended, also where labels are fewer
            mask = torch.ones_like(batch["input_ids"])
        return count_by_row(self.labels(batch), mask, self.weights(batch))

    def model_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of a batch for the model: all but labels and weights."""
        withheld = {*self.label_names, *WEIGHTS, TARGET_INDEX}
        return {name: value for name, value in batch.items() if name not in withheld}

    def check(self, batch: Mapping[str, Any], targets: Targets, outcomes: int) -> None:
        """InputError for a label that is none of the outcomes. All on the CPU."""
        labels = targets.labels
        wrong = (labels >= outcomes) | (labels < 0)
        if bool(wrong.any()):
            raise InputError(self._wrong_label(int(labels[wrong].max()), outcomes))

    def _wrong_label(self, label: int, outcomes: int) -> str:
        return (
            f"a label is the token id {label}, but the student predicts only the ids 0 to "
            f"{outcomes - 1} (-100 means no label): use the student's own tokenizer"
        )

    # ---- Models ----

    def outcomes(self, model: Any) -> int:
        """The number of outcomes that a model's logits are for."""
        return head_rows(model)

    def logits(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """The logits of a forward, (rows, positions, outcomes). inputs: see `model_inputs`."""
        return outputs.logits

    def check_divergence(self, divergence: Divergence) -> None:  # noqa: B027
        """InputError for a divergence that the outputs of this task do not have."""

    def check_pair(self, student: Any, teacher: Any) -> None:  # noqa: B027
        """InputError where the outcomes of student and teacher do not mean the same.

        student, teacher: transformers models. For tokens the tokenizers are compared instead.
        """

    def runner(self, model: Any, role: str, *, fused: bool = True, **options: Any) -> ModelRunner:
        """Runs a model of this task; see `ModelRunner`."""
        return ModelRunner(
            model,
            role,
            outcomes=self.outcomes(base_model(model)),
            read=self.logits,
            withheld=self.withheld,
            fused=fused and self.fused,
            **options,
        )
