"""Classification of sequences and of tokens, and regression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_distill.errors import InputError
from hf_distill.losses.divergences import Divergence, forward_kl, reverse_kl
from hf_distill.losses.targets import IGNORE, Targets
from hf_distill.models.heads import has_head
from hf_distill.tasks.base import Task
from hf_distill.tasks.masked_lm import without_padding

ONE = "single_label_classification"
SEVERAL = "multi_label_classification"
NUMBERS = "regression"


@dataclass(frozen=True)
class SequenceClassification(Task):
    """One label per row, several independent labels, or numbers.

    problem: as in a config's `problem_type`
    classes: the number of labels in the config

    One label: a row is a target, with a distribution over the classes.
    Several: a row has a target for each class, with a distribution over no (0) and yes (1).
    Numbers: a row has a target for each number. The student's is the mean of a normal distribution
    with variance 1/2, so that cross-entropy is the squared error, up to a constant, and so is the
    KL to the teacher.
    A row without a label (`IGNORE`, for numbers NaN) is a target of the divergence only.
    """

    key: ClassVar[str] = "sequence-classification"
    name: ClassVar[str] = "sequence classification"
    fused: ClassVar[bool] = False
    aligned: ClassVar[bool] = False
    label_names: ClassVar[tuple[str, ...]] = ("labels",)
    reads: ClassVar[tuple[str, ...]] = ("labels",)

    problem: str
    classes: int

    @classmethod
    def refusal(cls, model: Any) -> str | None:
        """See `Task.refusal`."""
        if not has_head(model, cls.key):
            return "it does not classify: load it with AutoModelForSequenceClassification"
        return None

    @classmethod
    def of(cls, model: Any) -> SequenceClassification:
        """See `Task.of`."""
        return cls.of_config(model.config)

    @classmethod
    def of_config(cls, config: Any) -> SequenceClassification:
        """The task of a config. One that names no problem means one label, or one number."""
        return cls(
            config.problem_type or (NUMBERS if config.num_labels == 1 else ONE), config.num_labels
        )

    def labels(self, batch: Mapping[str, Any]) -> Tensor:
        """See `Task.labels`. raises: InputError for labels of another problem"""
        given = batch["labels"]
        rows = given[:, None] if given.dim() == 1 else given
        width = 1 if self.problem == ONE else self.classes
        if rows.dim() != 2 or rows.shape[1] != width:
            raise InputError(self._other_problem(tuple(given.shape)))
        if self.problem == NUMBERS:
            # A true -100 is moved by its last bit, since the integer means "no label".
            values = rows.float().nan_to_num(0.0)
            return values.masked_fill(values == IGNORE, IGNORE * (1 - 1e-7))
        if self.problem == ONE and rows.is_floating_point():
            raise InputError(
                "labels are fractions, but the student has one class for a row: give class "
                "numbers, or for a number as label make the student with num_labels=1"
            )
        return rows.long().masked_fill(rows == IGNORE, 0)

    def weights(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `Task.weights`. What has no label weighs nothing in the cross-entropy."""
        weights, labels = super().weights(batch), batch["labels"]
        known = ~labels.isnan() if self.problem == NUMBERS else labels != IGNORE
        known = known[:, None] if known.dim() == 1 else known
        given = weights.get("ce_weight")
        weights["ce_weight"] = known.float() if given is None else known * given[:, None]
        return weights

    def check(self, batch: Mapping[str, Any], targets: Targets, outcomes: int) -> None:
        """See `Task.check`."""
        if self.problem != NUMBERS:
            super().check(batch, targets, outcomes)

    def outcomes(self, model: Any) -> int:
        """See `Task.outcomes`."""
        return {ONE: model.config.num_labels, SEVERAL: 2, NUMBERS: 1}[self.problem]

    def logits(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """See `Task.logits`."""
        logits = outputs.logits
        if self.problem == ONE:
            return logits[:, None, :]
        if self.problem == SEVERAL:  # sigmoid(z) is the second of softmax(0, z)
            return torch.stack((torch.zeros_like(logits), logits), dim=-1)
        return logits[:, :, None]

    @property
    def not_recorded(self) -> str | None:  # type: ignore[override]
        """See `Task`."""
        return "its outputs are numbers, not distributions" if self.problem == NUMBERS else None

    def check_divergence(self, divergence: Divergence) -> None:
        """See `Task.check_divergence`."""
        if self.problem == NUMBERS and divergence not in (forward_kl, reverse_kl):
            raise InputError(
                "the student predicts numbers, for which the divergence from the teacher is the "
                "squared difference: set divergence to forward_kl"
            )

    def check_pair(self, student: Any, teacher: Any) -> None:
        """See `Task.check_pair`."""
        match_classes(student.config, teacher.config)
        other = SequenceClassification.of(teacher).problem
        if other != self.problem:
            raise InputError(
                f"the student's problem_type is {self.problem}, but the teacher's is {other}: "
                "their outputs do not mean the same"
            )

    def _wrong_label(self, label: int, outcomes: int) -> str:
        if self.problem == SEVERAL:
            return f"a label is {label}, but with several labels each is 0 or 1"
        return (
            f"a label is the class {label}, but the student has the classes 0 to {outcomes - 1}: "
            f"make it with num_labels={label + 1} or more, or check the labels"
        )

    def _other_problem(self, shape: tuple[int, ...]) -> str:
        if self.problem == ONE:
            return (
                f"labels have the shape {shape}, but the student gives a row one class: for "
                'several at once make it with problem_type="multi_label_classification"'
            )
        return (
            f"labels have the shape {shape}, but the student ({self.problem}) gives a row "
            f"{self.classes} values: give as many labels"
        )


class TokenClassification(Task):
    """A class for each token that has a label; padding is no target."""

    key: ClassVar[str] = "token-classification"
    name: ClassVar[str] = "token classification"
    fused: ClassVar[bool] = False
    label_names: ClassVar[tuple[str, ...]] = ("labels",)
    reads: ClassVar[tuple[str, ...]] = ("labels", "attention_mask")

    @classmethod
    def refusal(cls, model: Any) -> str | None:
        """See `Task.refusal`."""
        if not has_head(model, cls.key):
            return "it does not classify tokens: load it with AutoModelForTokenClassification"
        return None

    def labels(self, batch: Mapping[str, Any]) -> Tensor:
        """See `Task.labels`."""
        return without_padding(batch["labels"], batch)

    def outcomes(self, model: Any) -> int:
        """See `Task.outcomes`."""
        return model.config.num_labels

    def check_pair(self, student: Any, teacher: Any) -> None:
        """See `Task.check_pair`."""
        match_classes(student.config, teacher.config)

    def _wrong_label(self, label: int, outcomes: int) -> str:
        return (
            f"a label is the class {label}, but the student has the classes 0 to {outcomes - 1}: "
            f"make it with num_labels={label + 1} or more, or check the labels"
        )


def match_classes(student: Any, teacher: Any) -> None:
    """InputError if two configs have different classes, or the same in another order.

    A student whose classes have no names gets the teacher's.
    """
    if student.num_labels != teacher.num_labels:
        raise InputError(
            f"the student has {student.num_labels} classes and the teacher {teacher.num_labels}, "
            f"so their distributions cannot be compared: make the student with "
            f"num_labels={teacher.num_labels}"
        )
    ours, theirs = student.id2label or {}, teacher.id2label or {}
    if is_unnamed(ours) and not is_unnamed(theirs):
        student.id2label = dict(theirs)
        student.label2id = {name: number for number, name in theirs.items()}
    if is_unnamed(ours) or is_unnamed(theirs):
        return
    for number in sorted(ours):
        if ours[number] != theirs.get(number):
            raise InputError(
                f"class {number} is {ours[number]!r} for the student and {theirs.get(number)!r} "
                "for the teacher: give the student the teacher's id2label and label2id"
            )


def is_unnamed(names: Mapping[int, str]) -> bool:
    """Whether a config has only the names that transformers gives to classes without one."""
    return all(name == f"LABEL_{number}" for number, name in names.items())
