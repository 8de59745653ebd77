"""The loss of one micro-batch: one forward of the teacher and one of the student."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_distill.errors import InputError
from hf_distill.losses.objective import Objective, Term
from hf_distill.losses.parts import Part, evaluate_parts
from hf_distill.losses.signals import Hidden, Logits, Signal
from hf_distill.losses.targets import DENOMINATORS, Targets, accumulator, precise_sum
from hf_distill.models.base import base_model
from hf_distill.models.runner import ModelRunner
from hf_distill.recordings.reader import recorded_signal, without_recording
from hf_distill.tasks import Task
from hf_distill.teachers import Teacher
from hf_distill.training.features import Features
from hf_distill.training.on_policy.written import judged_apart, without_written
from hf_distill.training.target_index import StepTargets

Counts = dict[str, Tensor]
# A loss, and values at the targets by name with the name of their denominator.
Evaluated = tuple[Tensor, dict[str, tuple[Tensor, str]]]


@dataclass(frozen=True)
class BatchLoss:
    """The loss of one micro-batch, in parts.

    loss: 0-dim, the objective without its terms, times the scale; carries the gradient
    per_target: values at the targets times their weights, with the name of their denominator
    terms: further terms by name; outputs: what the student's forward returned
    """

    loss: Tensor
    targets: Targets
    per_target: dict[str, tuple[Tensor, str]]
    terms: dict[str, Term]
    outputs: Any

    def total(self, counts: Counts, processes: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss with its terms, and each part's share of its mean over the step."""
        loss = self.loss
        parts = {
            name: processes * precise_sum(values) / counts[denominator]
            for name, (values, denominator) in self.per_target.items()
        }
        for name, term in self.terms.items():
            mean = processes * precise_sum(term.row_sums) / counts[term.denominator]
            parts[name] = mean.detach()
            loss = loss + term.weight * mean
        return loss.float(), parts

    def visible_outputs(self, model: Any, ignore_keys: list[str] | None) -> Any:
        """What `compute_metrics` and `predict` get of the outputs, as in Trainer."""
        if ignore_keys is None:
            config = base_model(model).config
            ignore_keys = getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])
        logits = tuple(v for k, v in self.outputs.items() if k not in (*ignore_keys, "loss"))
        return logits[0] if len(logits) == 1 else logits


@dataclass
class DistillationLoss:
    """Computes the loss of micro-batches.

    teacher: None where batches carry recordings, or alpha is 0
    step_targets: the index of the targets where the trainer's collator has made it
    teacher_inputs, extra_terms: the trainer's hooks
    features: losses between internal states of student and teacher
    auxiliary_weight: of the student's own auxiliary loss (`outputs.aux_loss`)
    judging: a context around the live teacher's forward, which times it
    """

    student: ModelRunner
    teacher: Teacher | None
    task: Task
    step_targets: StepTargets
    teacher_inputs: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    extra_terms: Callable[[Mapping[str, Any], Any], dict[str, Term]]
    features: Features
    auxiliary_weight: float = 0.0
    judging: Callable[[], AbstractContextManager[None]] = nullcontext

    def __call__(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        objective: Objective,
        counts: Counts,
        processes: int = 1,
        *,
        whole_logits: bool = False,
    ) -> BatchLoss:
        """Compute the loss of one micro-batch.

        model: the student, wrapped by an engine or not; batch: on its device, with labels
        counts: of the whole optimizer step (see `step_counts`)
        processes: by which engines divide when they average gradients
        whole_logits: the caller needs `outputs.logits`
        raises: InputError where alpha is above 0 and there is neither teacher nor recording
        """
        self.student.check_length(batch)  # before the teacher, which may take fewer tokens
        targets = self.task.targets(batch, self.step_targets.find(batch))
        batch, written = without_written(batch)
        inputs = self.task.model_inputs(without_recording(batch))
        signal: Signal | None = None
        judged = objective.alpha > 0 or not model.training
        parts: tuple[Part, ...] = ()
        with self.features.of_teacher() as of_teacher:
            if written is not None:
                self.features.check_written(written.asked)
                parts = judged_apart(self, batch, written, targets, objective)
            else:
                signal = recorded_signal(batch, targets) if judged else None
                if signal is None and self.teacher is not None and (judged or self.features):
                    signal = self.asked(self.teacher_inputs(inputs), targets)
        if signal is None and objective.alpha > 0 and written is None:
            raise InputError(
                f"alpha is {objective.alpha}, but the batch has no recording and no teacher was "
                "given: record all rows, pass teacher=, or set alpha to 0"
            )
        scale = processes / counts["targets"].to(accumulator(counts["targets"]))

        def evaluate(student: Hidden | Logits) -> tuple[Evaluated, Tensor]:
            if parts:
                found = evaluate_parts(parts, student, targets, counts, scale)
                return found, found[0]
            value = objective(student, targets, signal if judged else None, counts, scale)
            return (value.loss, objective.weighted(value.per_target, targets)), value.loss

        with self.features.of_student() as of_student:
            (loss, per_target), outputs, zero = self.student.run(
                model, inputs, targets, evaluate, whole_logits=whole_logits
            )
        terms = self.features.terms(of_student, of_teacher, batch, targets)
        terms |= self._auxiliary(outputs, batch) | self.extra_terms(inputs, outputs)
        return BatchLoss(
            loss=loss if zero is None else loss + zero,
            targets=targets,
            per_target=per_target,
            terms=terms,
            outputs=outputs,
        )

    def asked(self, inputs: Mapping[str, Any], targets: Targets) -> Signal:
        """The live teacher's signal at the targets. inputs: the teacher's part of a batch"""
        assert self.teacher is not None
        with self.judging():
            return self.teacher.signal(inputs, targets)

    def _auxiliary(self, outputs: Any, batch: Mapping[str, Any]) -> dict[str, Term]:
        """The load-balancing loss of a mixture of experts, which its forward leaves out without
        labels. A mean over attended positions, so that micro-batches weigh by their size."""
        loss = getattr(outputs, "aux_loss", None)
        if not self.auxiliary_weight or loss is None:
            return {}
        attended = self.task.counts(batch)[:, DENOMINATORS.index("attended")]
        row_sums = loss.to(accumulator(attended)) * attended
        return {"router_aux_loss": Term(row_sums, "attended", self.auxiliary_weight)}


def step_counts(total: Tensor) -> Counts:
    """Denominators by name, from their totals: (counts,), as `DENOMINATORS`.

    At least one each, so that a step without any target costs exactly zero instead of 0/0.
    """
    return dict(zip(DENOMINATORS, total.clamp(min=1).unbind(), strict=True))
