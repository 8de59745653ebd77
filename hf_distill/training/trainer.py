"""`DistillationTrainer`: a `transformers.Trainer` that minimises cross-entropy and a divergence.

The trainer combines parts of other modules: a task defines the targets, a teacher turns a batch
into a signal, `training.loss` computes sums from student, labels and signal. It overrides Trainer's
methods for counting (`_get_num_items_in_batch`), for the loss (`compute_loss`, `prediction_step`)
and for logs; `training.saving` overrides those for saving, `training.datasets` those for data sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from hf_distill.losses.divergences import Divergence, named_divergence
from hf_distill.losses.objective import Objective, Term
from hf_distill.losses.targets import WEIGHTS, total_counts
from hf_distill.recordings.collator import ALL_NAMES
from hf_distill.teachers import Teacher
from hf_distill.training import setup
from hf_distill.training.arguments import DistillationArguments
from hf_distill.training.checkpoints import checkpoint_to_resume
from hf_distill.training.collator import checking_collator
from hf_distill.training.datasets import DatasetsMixin, prepare_datasets
from hf_distill.training.evaluation_sums import EvaluationSums
from hf_distill.training.loss import Counts, DistillationLoss, step_counts
from hf_distill.training.on_policy import OnPolicy
from hf_distill.training.recordings import find_recordings
from hf_distill.training.saving import SavingMixin
from hf_distill.training.step_sums import StepSums, loss_for_log
from hf_distill.training.student import check_distinct, warn_if_larger


class DistillationMixin(DatasetsMixin, SavingMixin):
    """The distillation part of a Trainer; see `DistillationTrainer` for the arguments.

    Subclasses may override
    - `choose_divergence()`: the function of (student, teacher) log-probabilities to minimise
    - `extra_terms(inputs, outputs)`: named terms to add to the objective
    - `teacher_inputs(inputs)`: the part of a batch that the teacher reads
    """

    # The loss is divided by the counts of the whole step, never again by accumulation steps.
    loss_is_scaled_for_ga = True

    arguments: type[DistillationArguments] = DistillationArguments
    args: DistillationArguments
    _loss: DistillationLoss

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
        teacher: PreTrainedModel | Teacher | str | None = None,
        args: DistillationArguments | None = None,
        *,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        divergence: Divergence | None = None,
        peft_config: PeftConfig | None = None,
        task: str | None = None,
        **others: Any,
    ) -> None:
        args, self._task = setup.check_arguments(args, others, self.arguments), task
        check_distinct(model, teacher, peft_config)
        student: Any = setup.make_student(model, teacher, args, peft_config, task)
        self.teacher = setup.make_teacher(
            teacher, student, args, task, teacher_tokenizer, others.get("processing_class")
        )
        warn_if_larger(student, self.teacher)
        self._rows = prepare_datasets(args, student, others, task, self.teacher)
        self._own_divergence = divergence
        self._recorded = find_recordings(args, others, has_teacher=self.teacher is not None)
        super().__init__(model=student, args=args, **others)
        self._sums, self._writer = StepSums(self.args), OnPolicy(self)
        self._evaluation = EvaluationSums()
        self._loss = setup.make_loss(self, task)
        self._objective = setup.make_objective(self, self._loss, self._recorded)
        self.data_collator = self._checks = checking_collator(self, self._loss, self._recorded)
        if self.teacher is not None:
            self.teacher.prepare(self.accelerator, student_reads=self._checks.known_ids)

    def call_model_init(self, trial: Any = None) -> Any:
        """As Trainer's. A new model has a new head, and is checked like the first one."""
        model: Any = super().call_model_init(trial)
        setup.check_student(model, self._task)
        if hasattr(self, "_loss"):  # not the first, for which the constructor does it
            self.model = model
            self._loss = setup.make_loss(self, self._task)
            self._loss.features.attach()
        return model

    # ---- Hooks for subclasses ----

    def overrides(self, hook: str) -> bool:
        """Whether a subclass overrides a method of this class."""
        return getattr(type(self), hook) is not getattr(DistillationMixin, hook)

    def choose_divergence(self) -> Divergence:
        """The divergence to minimise: the one passed in, or the one that the arguments name."""
        own, args = self._own_divergence, self.args
        return own or named_divergence(args.divergence, beta=args.beta, skew=args.skew)

    def extra_terms(self, inputs: Mapping[str, Any], outputs: Any) -> dict[str, Term]:
        """Further terms of the objective by name, logged and evaluated under these names."""
        return {}

    def teacher_inputs(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The part of a batch that the teacher reads, by default all but the labels."""
        return inputs

    # ---- The loss ----

    def current_objective(self) -> Objective:
        """The objective of the arguments as they are now, in training and in evaluation."""
        return self._objective(self.args)

    def _get_num_items_in_batch(  # type: ignore[override]  # several counts, not one
        self, batch_samples: list[Mapping[str, Any]], device: torch.device
    ) -> Counts | None:
        """Every denominator of one optimizer step, over its micro-batches and all processes."""
        if not batch_samples or not self._loss.task.has_labels(batch_samples[0]):
            return None
        total = total_counts([self._loss.task.counts(batch) for batch in batch_samples]).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.reduce(total, "sum")
        return step_counts(total)

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Counts | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss.

        `DistillationLoss` divides it by the counts of the whole step, and multiplies it by the
        number of processes, by which the engines divide when they average gradients.
        """
        self._loss.task.require_labels(inputs)
        counts: Any = num_items_in_batch or self._get_num_items_in_batch([inputs], self.args.device)
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        objective = self.current_objective()
        batch = self._loss(model, inputs, objective, counts, processes, whole_logits=return_outputs)
        loss, parts = batch.total(counts, processes)
        if model.training:
            self._sums.add(parts, loss.detach())
            if self.accelerator.sync_gradients:
                self._sums.start_check(self.accelerator, self.state.global_step + 1)
            if self.is_deepspeed_enabled:  # its backward takes the optimizer step
                self._sums.finish_step(self.accelerator)
        return (loss, batch.outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer's. A loss that is not finite ends the training before the optimizer step."""
        with self._writer.timed("step"):
            loss = super().training_step(*args, **kwargs)
        self._sums.finish_step(self.accelerator)
        return loss_for_log(self, loss)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; also generates on-policy rows and takes out the index of the targets."""
        counts: Any
        batches, counts = super().get_batch_samples(*args, **kwargs)
        counts = self._writer.write(batches) or counts
        self._loss.step_targets.take(batches, self._checks.check)
        return batches, counts

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As Trainer's, but recordings, weights and labels keep their dtype under DeepSpeed."""
        names = {*ALL_NAMES, *WEIGHTS, *self._loss.task.label_names}
        exact = [name for name in names if isinstance(inputs.get(name), Tensor)]
        kept = {name: inputs[name].to(self.args.device, non_blocking=True) for name in exact}
        rest = {name: value for name, value in inputs.items() if name not in exact}
        return self._loss.step_targets.follow(inputs, {**super()._prepare_inputs(rest), **kept})

    def _set_signature_columns_if_needed(self) -> None:
        """As Trainer's; also keeps the columns of the objective, which the model does not take."""
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        columns += setup.own_columns(self._loss.task, self._recorded) - {*columns}

    # ---- Training and its log ----

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """As Trainer's; resumes from complete checkpoints only."""
        folder, deepspeed = str(self.args.output_dir), self.is_deepspeed_enabled
        setup.allow_wrapping(self)
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, folder, deepspeed=deepspeed)
        self._loss.features.attach()
        try:
            return super().train(checkpoint, *args, **kwargs)
        finally:
            self._loss.features.detach()

    def _inner_training_loop(self, batch_size: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, which `auto_find_batch_size` restarts after running out of memory."""
        self._sums.reset()
        self._parts_to_log: dict[str, float] = {}
        return super()._inner_training_loop(batch_size, *args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's; adds the parts of the objective to the log."""
        if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
            self._parts_to_log = self._sums.pop_means(self.accelerator) | self._writer.pop_figures()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with `ce`, the divergence and further terms by name beside `loss`."""
        if "loss" in logs:
            logs, self._parts_to_log = {**logs, **self._parts_to_log}, {}
        super().log(logs, start_time)

    # ---- Evaluation ----

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """As Trainer's, keeping sums by row so that evaluation is exact for any batch size."""
        if not self._loss.task.has_labels(inputs):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs, whole = self._prepare_inputs(inputs), not prediction_loss_only
        rows = self._loss.task.counts(inputs)
        counts = step_counts(rows.sum(0))
        with torch.no_grad(), self.compute_loss_context_manager():
            objective = self.current_objective()
            batch = self._loss(model, inputs, objective, counts, whole_logits=whole)
        self._evaluation.add(batch, rows, self.accelerator.gather_for_metrics)
        if not whole:
            return batch.loss.float(), None, None
        outputs = batch.visible_outputs(self.model, ignore_keys)
        return batch.loss.float(), outputs, self._loss.task.given_labels(inputs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As Trainer's; the loss and its parts come from sums over rows, not means of batches."""
        self._evaluation = EvaluationSums()
        output = super().evaluation_loop(*args, **kwargs)
        if output.metrics is not None:
            prefix = kwargs.get("metric_key_prefix", "eval")
            for name, value in self._evaluation.metrics(self.current_objective()).items():
                output.metrics[f"{prefix}_{name}"] = value
        return output


class DistillationTrainer(DistillationMixin):
    """A `Trainer` that trains a student on labels and on a teacher's distributions.

    model: the student, or its id or path
    teacher: a model of the same task, its id or path, or any object with the `Teacher` protocol;
        the student itself if it has an adapter, so that its base model is the teacher (see also
        `AdapterTeacher`); None if the rows have recordings (`hf_distill.record`), or alpha is 0
    args: `DistillationArguments`
    teacher_tokenizer: to check that both models share a vocabulary; by default the one in a local
        teacher's folder
    divergence: your own function in place of the one that the arguments name
    peft_config: makes an adapter for the student, as `peft.get_peft_model` does
    task: "causal-lm", "seq2seq-lm", "masked-lm", "sequence-classification",
        "token-classification" or "question-answering"; by default that of the student's class,
        or the teacher's if the student is a path to a checkpoint without a head
    train_dataset, eval_dataset: rows with `input_ids`, and perhaps `labels` (by default the ids),
        `ce_weight` and `divergence_weight` (a number a row); or raw rows, which are tokenized with
        `processing_class`: `text`, `prompt` and `completion`, `messages`, or those of the task
    data_collator: by default `hf_distill.data.collator`, or `TaskCollator` for other tasks
    Further keyword arguments are Trainer's (callbacks, compute_metrics, optimizers, ...).
    raises: InputError at construction, for arguments or data that do not fit each other
    """
