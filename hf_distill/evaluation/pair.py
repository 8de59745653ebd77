"""Run a student and its teacher on the same batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.errors import InputError
from hf_distill.losses.signals import Sampled, TopK
from hf_distill.losses.targets import IGNORE, WEIGHTS, Targets, targets_of
from hf_distill.models import vocabulary
from hf_distill.models.base import base_model
from hf_distill.tasks import find_task
from hf_distill.teachers import AdapterTeacher, LiveTeacher, Teacher, as_teacher
from hf_distill.teachers.placement import placed_by_itself


@dataclass(frozen=True)
class Outputs:
    """The outputs of student and teacher on a batch.

    batch: as the collator made it, without weights
    labels: (rows, positions), an outcome at each target, `IGNORE` elsewhere
    labelled: (targets,) bool, False where a target has no label; `labels` then holds a placeholder
    student, teacher: (targets, outcomes) logits, row after row; the same object where the student
        is its own teacher; None without a teacher
    """

    batch: Mapping[str, Any]
    labels: Tensor
    labelled: Tensor
    student: Tensor
    teacher: Tensor | None


class Pair:
    """A student and its teacher; None for a student alone."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | Teacher | str | None,
        accelerator: Accelerator,
    ) -> None:
        self.plain = accelerator.unwrap_model(student)
        self.task = find_task(self.plain, "student")
        self.wrapped = student.eval()
        self.student = self.task.runner(self.plain, "model")
        self.student.autocast = accelerator.autocast
        found = None if teacher is student else as_teacher(teacher, task=self.task.key)
        if found is not None:
            found.prepare(accelerator, student_reads=self.student.embedding_rows)
        live = isinstance(found, LiveTeacher) and not isinstance(found, AdapterTeacher)
        own = live and getattr(found, "model", None) is student
        self.together = own and getattr(found, "together", False)
        self._itself = own or teacher is student
        self.teacher = None if self._itself else found
        if not own and not placed_by_itself(self.plain):
            student.to(accelerator.device)

    def shared_outcomes(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """How many outcomes, from 0 on, mean the same to both.

        raises: InputError where their tokens or classes differ
        """
        if self.teacher is None:
            return self.student.outcomes
        if self.task.fused:
            return vocabulary.shared_vocabulary(
                self.student.outcomes, self.teacher.rows, tokenizer, self.teacher.tokenizer
            )
        vocabulary.compare_tokens(tokenizer, self.teacher.tokenizer)
        model = getattr(self.teacher, "model", None)
        if model is not None:
            self.task.check_pair(base_model(self.plain), base_model(model))
        return self.student.outcomes

    def outputs(self, batch: Mapping[str, Any], theirs: Tensor | None = None) -> Outputs:
        """Run both on a batch.

        A model that is its own teacher is run once, so that it agrees with itself exactly.
        theirs: the teacher's logits on this batch, if another pair has computed them; the teacher
            then does not run again
        raises: InputError for a batch without labels, or with one that is none of the outcomes
        """
        if not self.task.has_labels(batch):
            raise InputError(
                f"the evaluation batch has no labels, only {', '.join(batch)}: add a labels "
                "column, or pass a data_collator that makes one"
            )
        batch = {name: value for name, value in batch.items() if name not in WEIGHTS}
        labels = self.task.labels(batch)
        self.task.check(batch, self.task.targets(batch), self.student.outcomes)
        if self.task.aligned or self.task.fused:
            asked = labels
        else:  # questions and rows to classify are targets with or without a label
            asked = labels.masked_fill(labels == IGNORE, 0)
        targets = targets_of(asked, self.task.weights(batch))
        labelled = targets.select(labels != IGNORE)
        if targets.ce_weight is not None:
            labelled = labelled & (targets.ce_weight != 0)
        ours, theirs = self._logits(batch, targets, theirs)
        return Outputs(batch, asked, labelled, ours, theirs)

    def _logits(
        self, batch: Mapping[str, Any], targets: Targets, theirs: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        inputs = self.task.model_inputs(batch)
        ours = self.student.signal(inputs, targets, self.wrapped).logits.to(targets.index.device)
        if self._itself:
            return ours, ours
        if self.teacher is None:
            return ours, None
        if theirs is not None:
            return ours, theirs
        signal = self.teacher.signal(inputs, targets)
        if isinstance(signal, Sampled | TopK):
            raise InputError(
                f"the teacher {self.teacher.name!r} returns only some ids of its distributions, "
                "but these figures compare whole distributions: evaluate with a live teacher"
            )
        return ours, signal.logits.to(ours.device)
