"""`DistillationTrainer`: a `transformers.Trainer` whose loss also asks a teacher.

Everything here joins things that are explained elsewhere: the batch is read by `targets`, the
teacher (`teachers`) turns it into a signal, the `objective` turns student, labels and signal into
sums. Trainer's own methods are overridden where it counts (`_get_num_items_in_batch`), where it
computes (`compute_loss`, `prediction_step`), where it reports, and nowhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from hf_distill.errors import InputError, warn_once
from hf_distill.losses.divergences import Divergence, named_divergence
from hf_distill.losses.fused_head import Head
from hf_distill.losses.objective import Judgement, Objective, Term, precise_sum, sum_by_row
from hf_distill.losses.targets import (
    DENOMINATORS,
    IGNORE,
    accumulator,
    count,
    count_by_row,
    position_ids,
    target_labels,
)
from hf_distill.models.from_scratch import max_positions
from hf_distill.models.loading import load_model
from hf_distill.models.output_head import StandIn, UnusualHead
from hf_distill.models.vocabulary import embedding_rows, head_rows, known_ids, shared_vocabulary
from hf_distill.recordings.reader import recorded_signal, without_recording
from hf_distill.teachers import (
    AdapterTeacher,
    Teacher,
    as_teacher,
)
from hf_distill.training.arguments import DistillationArguments
from hf_distill.training.artifacts import ArtifactsMixin
from hf_distill.training.checkpoints import last_complete_checkpoint
from hf_distill.training.recorded_rows import RecordedRowsMixin

Denominators = dict[str, Tensor]
LABELS = ("labels", "shift_labels")


class DistillationMixin(RecordedRowsMixin, ArtifactsMixin):
    """What makes a Trainer a distillation; see `DistillationTrainer` for the arguments.

    Subclasses may override
    - `choose_divergence()`: the function of (student, teacher) log-probabilities to minimise
    - `extra_terms(inputs, outputs)`: named terms to add to the objective
    - `teacher_inputs(inputs)`: what the teacher sees of a batch
    """

    # The loss is divided by the counts of the whole step, never again by accumulation steps.
    loss_is_scaled_for_ga = True

    args: DistillationArguments
    teacher: Teacher | None
    objective: Objective
    _non_finite: Tensor

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
        teacher: PreTrainedModel | Teacher | str | None = None,
        args: DistillationArguments | None = None,
        *,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        divergence: Divergence | None = None,
        **trainer_arguments: Any,
    ) -> None:
        args = DistillationArguments("trainer_output") if args is None else args
        if not isinstance(args, DistillationArguments):
            raise InputError(
                f"args is a {type(args).__name__}, which has no alpha or temperature: "
                "use hf_distill.DistillationArguments, which takes the same options and these"
            )
        if trainer_arguments.get("compute_loss_func") is not None:
            raise InputError(
                "compute_loss_func would replace the whole objective: pass divergence=, or "
                "override extra_terms in a subclass"
            )
        if isinstance(model, str | Path):
            model = load_model(model, "student", **args.model_kwargs("student"))
        _refuse_prompts(model)
        itself: Any = model
        # Its base too: a teacher of its own would freeze what the adapter stands in.
        if teacher is not None and any(teacher is part for part in (model, _unwrapped(itself))):
            own = trainer_arguments.get("processing_class")
            teacher = AdapterTeacher(itself, tokenizer=own, whole_logits=not args.fused_head)
        self.teacher = as_teacher(
            teacher,
            teacher_tokenizer,
            whole_logits=not args.fused_head,
            placement=args.teacher_placement,
            **args.model_kwargs("teacher"),
        )
        if isinstance(self.teacher, AdapterTeacher) and self.teacher.model is not itself:
            raise InputError(
                "the AdapterTeacher holds another model than the student, whose weights it is to "
                "share: make it of the student, or give that model itself as the teacher"
            )
        self._custom_divergence = divergence
        sets = {name: trainer_arguments.get(name) for name in ("train_dataset", "eval_dataset")}
        self._recorded = self._find_recordings(args, **sets)
        super().__init__(model=itself, args=args, **trainer_arguments)
        if self._recorded is not None:
            self._read_recordings(self._recorded, head_rows(_unwrapped(self.model)))
        self._accepted_by_student = _forward_parameters(self.model)
        self.objective = self._make_objective()
        self._stand_in = self._find_head()
        if self.teacher is not None:
            reads = embedding_rows(_unwrapped(self.model))
            self.teacher.prepare(self.accelerator, student_reads=reads)
        self._suppress_ids_without_token()
        self._reset_running_parts()

    def call_model_init(self, trial: Any = None) -> Any:
        """As Trainer's; a model that is made anew has another head to stand in for."""
        model = super().call_model_init(trial)
        if hasattr(self, "objective"):  # not the first, which the rest of the set-up is made for
            self.model = model
            self._stand_in = self._find_head()
            self._suppress_ids_without_token()
        return model

    # ---- Hooks for subclasses ----

    def choose_divergence(self) -> Divergence:
        """The divergence to minimise: the one passed in, or the one that the arguments name."""
        if self._custom_divergence is not None:
            return self._custom_divergence
        args = self.args
        return named_divergence(args.divergence, beta=args.beta, skew=args.skew)

    def extra_terms(self, inputs: Mapping[str, Any], outputs: Any) -> dict[str, Term]:
        """Further terms of the objective by name, logged and evaluated under these names."""
        return {}

    def teacher_inputs(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The part of a batch that the teacher sees, by default all but the labels."""
        return inputs

    # ---- The loss ----

    def _get_num_items_in_batch(  # type: ignore[override]  # several counts, not one
        self, batch_samples: list[Mapping[str, Any]], device: torch.device
    ) -> Denominators | None:
        """Every denominator of one optimizer step, over its micro-batches and all processes."""
        if not batch_samples or not _has_labels(batch_samples[0]):
            return None
        counts = count(batch_samples).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        # At least one, so that a step without any target costs exactly zero instead of 0/0.
        return dict(zip(DENOMINATORS, counts.clamp(min=1).unbind(), strict=True))

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Denominators | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss.

        Divided by the counts of the whole step, and multiplied by the number of processes, which
        the engines divide by when they average gradients.
        """
        if not _has_labels(inputs):
            raise InputError(
                f"the batch has no labels, only {', '.join(inputs)}: the loss is taken where a "
                "label is; add a labels column, or a collator that makes one"
            )
        counts = num_items_in_batch or self._get_num_items_in_batch([inputs], self.args.device)
        assert counts is not None  # there are labels
        averaged = self.args.average_tokens_across_devices
        processes = self.accelerator.num_processes if averaged else 1
        scale = processes / counts["targets"].to(accumulator(counts["targets"]))
        judgement, terms, outputs = self._judge(model, inputs, scale, whole_logits=return_outputs)
        parts = {name: scale * precise_sum(v) for name, v in judgement.per_target.items()}
        loss = judgement.loss
        for name, term in terms.items():
            mean = precise_sum(term.row_sums) / counts[term.denominator]
            parts[name] = processes * mean.detach()
            loss = loss + processes * term.weight * mean
        loss = loss.float()
        if model.training:
            self._keep_parts(parts)
            self._refuse_non_finite(loss.detach())
        return (loss, outputs) if return_outputs else loss

    def _judge(
        self, model: nn.Module, inputs: Mapping[str, Any], scale: Tensor, *, whole_logits: bool
    ) -> tuple[Judgement, dict[str, Term], Any]:
        """One forward of teacher and student: the objective's sums, times the scale.

        whole_logits: somebody wants to see `outputs.logits`
        """
        try:
            return self._ask(model, inputs, scale, whole_logits)
        except IndexError:
            if (ids := inputs.get("input_ids")) is not None:
                student = _unwrapped(self.model)
                _refuse_long(ids.shape[-1], student, getattr(self.teacher, "model", None))
                known_ids(ids, None, embedding_rows(student), "the student")
            raise

    def _ask(
        self, model: nn.Module, inputs: Mapping[str, Any], scale: Tensor, whole_logits: bool
    ) -> tuple[Judgement, dict[str, Term], Any]:
        """The same, with a bare IndexError where a row has no place in a model's tables."""
        labels = target_labels(inputs)
        targets = labels != IGNORE
        labels = labels[targets]
        recorded = recorded_signal(inputs, targets)
        inputs = {k: v for k, v in without_recording(inputs).items() if k not in LABELS}
        counts_positions = "position_ids" in self._accepted_by_student
        if counts_positions and "position_ids" not in inputs and "attention_mask" in inputs:
            inputs["position_ids"] = position_ids(inputs["attention_mask"])
        signal = None
        if self.args.alpha > 0 or not model.training:
            signal = recorded
            if signal is None and self.teacher is not None:
                signal = self.teacher.signal(self.teacher_inputs(inputs), targets)
        if signal is None and self.args.alpha > 0:
            raise InputError(
                f"alpha is {self.args.alpha}, but no row of a batch has a recording, and there is "
                "no teacher to ask: record all rows, pass teacher=, or set alpha to 0"
            )

        def at_the_head(hidden: Tensor, head: Head) -> tuple[Judgement, Tensor]:
            memory_mb = self.args.head_memory_mb
            judgement = self.objective.judge_fused(
                hidden[targets], head, labels, signal, scale, memory_mb=memory_mb
            )
            return judgement, judgement.loss

        if self._stand_in is not None and not whole_logits:
            try:
                outputs, judgement = self._stand_in.run(model, inputs, at_the_head)
            except UnusualHead as reason:
                self._stand_in = None
                self._warn_of_whole_logits(reason)
            else:
                loss = judgement.loss + 0.0 * outputs.logits.sum()
                judgement = Judgement(loss, judgement.per_target)
                return judgement, self.extra_terms(inputs, outputs), outputs
        outputs = model(**inputs, use_cache=False)
        judgement = self.objective.judge(outputs.logits[targets], labels, signal, scale)
        return judgement, self.extra_terms(inputs, outputs), outputs

    def _refuse_non_finite(self, loss: Tensor) -> None:
        """Stop all ranks together at a NaN, before the optimizer and the log filter see it.

        One synchronisation an optimizer step, at its last micro-batch, not one a micro-batch.
        """
        self._non_finite = self._non_finite | ~loss.isfinite()
        if not self.accelerator.sync_gradients:
            return
        parts = torch.stack(list(self._running_parts.values()))
        flags = torch.cat([self._non_finite[None], ~parts.isfinite()]).to(torch.int32)
        loss_is_bad, ce_is_bad, *_ = self.accelerator.reduce(flags, "sum").tolist()
        if loss_is_bad:
            cause = (
                "the student's own cross-entropy is not finite, so its weights have diverged: "
                "lower learning_rate, set max_grad_norm, or use bf16 instead of fp16"
                if ce_is_bad
                else "the student's cross-entropy is finite, so the teacher's logits are not: load "
                "the teacher in bfloat16 or float32 (teacher_model_kwargs)"
            )
            kept = last_complete_checkpoint(self.folder)
            raise InputError(
                f"the loss is not finite at step {self.state.global_step + 1}: {cause}; "
                f"last good checkpoint: {kept or 'none yet'}"
            )

    # ---- Logs ----

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trainer's `train`, with the objective's parts counted afresh."""
        self._reset_running_parts()
        return super().train(*args, **kwargs)

    def _reset_running_parts(self) -> None:
        self._running_parts: dict[str, Tensor] = {}
        self._parts_to_log: dict[str, float] = {}
        self._non_finite = torch.zeros((), dtype=torch.bool, device=self.args.device)

    def _keep_parts(self, parts: dict[str, Tensor]) -> None:
        for name, value in parts.items():
            self._running_parts[name] = self._running_parts.get(name, 0.0) + value

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Hand the objective's parts to the log that Trainer is about to write."""
        steps = self.state.global_step - self._globalstep_last_logged
        if self.control.should_log and steps > 0 and self._running_parts:
            means = torch.stack(list(self._running_parts.values())) / steps
            means = self.accelerator.reduce(means, "mean").tolist()
            self._parts_to_log = dict(zip(self._running_parts, means, strict=True))
            self._running_parts = {}
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log, with `ce`, the divergence and further terms by name beside `loss`."""
        if "loss" in logs:
            logs = {**logs, **self._parts_to_log}
            self._parts_to_log = {}
        super().log(logs, start_time)

    # ---- Evaluation ----

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Trainer's step, keeping sums by row so that evaluation is exact for any batch size."""
        if not _has_labels(inputs):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        labels = target_labels(inputs)
        targets = labels != IGNORE
        scale = 1 / targets.sum().clamp(min=1).to(accumulator(targets))
        with torch.no_grad(), self.compute_loss_context_manager():
            judgement, terms, outputs = self._judge(
                model, inputs, scale, whole_logits=not prediction_loss_only
            )
        rows, row_of = len(labels), targets.nonzero()[:, 0]
        sums = {k: sum_by_row(v, row_of, rows) for k, v in judgement.per_target.items()}
        sums |= {name: term.row_sums for name, term in terms.items()}
        self._terms = {name: (term.denominator, term.weight) for name, term in terms.items()}
        sums |= dict(zip(DENOMINATORS, count_by_row(inputs).unbind(-1), strict=True))
        table = torch.stack([s.to(accumulator(s)) for s in sums.values()], dim=-1)  # (rows, sums)
        # Gathered by row, so that rows repeated to even out the last batch are dropped.
        gathered = self.accelerator.gather_for_metrics(table)
        for name, total in zip(sums, gathered.sum(0), strict=True):
            self._evaluated[name] = self._evaluated.get(name, 0.0) + total
        loss = judgement.loss.float()
        if prediction_loss_only:
            return loss, None, None
        config = _unwrapped(self.model).config
        ignored = ignore_keys or getattr(config, "keys_to_ignore_at_inference", None) or []
        logits = tuple(v for k, v in outputs.items() if k not in ignored)
        return loss, logits[0] if len(logits) == 1 else logits, inputs.get("labels", labels)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Trainer's loop; the loss and its parts come from sums over rows, not means of batches."""
        self._evaluated: dict[str, Any] = {}
        output = super().evaluation_loop(*args, **kwargs)
        if self._evaluated and output.metrics is not None:
            prefix = kwargs.get("metric_key_prefix", "eval")
            output.metrics.update(
                {f"{prefix}_{k}": v for k, v in self._evaluation_metrics().items()}
            )
        return output

    def _evaluation_metrics(self) -> dict[str, float]:
        sums = {name: float(value) for name, value in self._evaluated.items()}
        counts = {name: sums.pop(name) for name in DENOMINATORS}
        if counts["targets"] == 0:
            raise InputError(
                "the evaluation set has no target, since every label in it is -100: "
                "check how its labels are masked"
            )
        means = {
            name: value / counts[self._terms.get(name, ("targets", 1.0))[0]]
            for name, value in sums.items()
        }
        loss = (1 - self.args.alpha) * means["ce"]
        scale = self.args.alpha * self.args.temperature**2
        loss += scale * means.get(self.objective.name, 0.0)
        loss += sum(weight * means[name] for name, (_, weight) in self._terms.items())
        return {"loss": loss, **means}

    # ---- Construction ----

    def _make_objective(self) -> Objective:
        rows = head_rows(_unwrapped(self.model))
        shared = rows if self._recorded is None else self._recorded.vocabulary
        if self.teacher is not None:
            tokenizer = self.processing_class
            shared = shared_vocabulary(
                rows,
                self.teacher.rows,
                tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None,
                self.teacher.tokenizer,
            )
            if self._recorded is not None and self._recorded.vocabulary != shared:
                raise InputError(
                    f"the recording is over {self._recorded.vocabulary} ids, but student and "
                    f"teacher share {shared}: record with this teacher, or pass teacher=None"
                )
        divergence = self.choose_divergence()
        function = divergence.func if isinstance(divergence, partial) else divergence
        name = getattr(function, "__name__", "divergence")
        name = name if name.isidentifier() else "divergence"  # a lambda is called "<lambda>"
        return Objective(self.args.alpha, self.args.temperature, divergence, name, shared)

    def _find_head(self) -> StandIn | None:
        """The place of the student's output head, where the loss can be made inside it."""
        if not self.args.fused_head:
            return None
        try:
            if type(self).extra_terms is not DistillationMixin.extra_terms:
                raise UnusualHead("extra_terms may look at its logits")
            if self.args.torch_compile:
                raise UnusualHead("it is compiled as a whole")
            return StandIn(_unwrapped(self.model))
        except UnusualHead as reason:
            self._warn_of_whole_logits(reason)
            return None

    def _warn_of_whole_logits(self, reason: UnusualHead) -> None:
        warn_once("The student makes all of its logits at once, since %s.", reason)

    def _suppress_ids_without_token(self) -> None:
        """Head rows beyond the tokenizer (padding) are never generated from a saved student."""
        model, tokenizer = _unwrapped(self.model), self.processing_class
        if isinstance(tokenizer, PreTrainedTokenizerBase) and model.can_generate():
            unused = list(range(len(tokenizer), head_rows(model)))
            if unused:
                already = model.generation_config.suppress_tokens or []
                model.generation_config.suppress_tokens = sorted({*already, *unused})


class DistillationTrainer(DistillationMixin):
    """Trains a student on labels and on a teacher's distributions; otherwise a `Trainer`.

    model: the student, a causal language model or its id or path
    teacher: a causal language model, its id or path, or any object with the `Teacher` protocol;
        the student itself, if it has an adapter: its base teaches (see also `AdapterTeacher`);
        None where the rows bring recordings (`hf_distill.record`), or alpha is 0
    args: `DistillationArguments`
    teacher_tokenizer: to check that ids mean the same; found by itself beside a local teacher
    divergence: a function of your own in place of the one that the arguments name, see
        `hf_distill.losses.divergences`
    Further keyword arguments are Trainer's (train_dataset, eval_dataset, processing_class,
    data_collator, callbacks, compute_metrics, optimizers, ...).
    raises: InputError for what cannot work, at construction
    """


def _unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model inside an adapter; the model itself where there is none."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _refuse_long(tokens: int, student: Any, teacher: Any) -> None:
    """InputError for a row that is longer than a model's positions."""
    for role, model in {"student": student, "teacher": teacher}.items():
        positions = max_positions(model.config) if isinstance(model, PreTrainedModel) else None
        if positions is not None and tokens > positions:
            raise InputError(
                f"a row has {tokens} tokens, but the {role} takes {positions} at most: tokenize "
                "with truncation=True and max_length, or cut the rows"
            )


def _refuse_prompts(model: Any) -> None:
    """InputError for learned prompts: they stand before the tokens and move every position."""
    for name, config in getattr(model, "peft_config", {}).items():
        if config.is_prompt_learning:
            raise InputError(
                f"adapter {name!r} is {config.peft_type.value}, whose learned prompt gives the "
                "student other positions than the teacher has: use an adapter on the weights, as "
                "LoRA"
            )


def _forward_parameters(model: nn.Module) -> set[str]:
    return set(inspect.signature(_unwrapped(model).forward).parameters)


def _has_labels(batch: Mapping[str, Any]) -> bool:
    return any(batch.get(name) is not None for name in LABELS)
