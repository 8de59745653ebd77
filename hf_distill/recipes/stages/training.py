"""Stages `teacher`, `baseline`, `off_policy` and `train`: one training with other settings."""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_distill.data import require_rows
from hf_distill.evaluation.performance import MB, PeakMemory
from hf_distill.recipes import arguments
from hf_distill.recipes.stages.given_models import check_student
from hf_distill.recipes.stages.inputs import teacher_options, training_arguments
from hf_distill.recipes.stages.models import (
    collator_of,
    merge_adapter,
    rows_of,
    rows_of_baseline,
    rows_to_train,
    student_initial,
    student_to_train,
    student_to_train_on,
    teacher_source,
    teacher_to_train,
    teacher_tokenizer_of,
    teaches_itself,
    tokenizer_of,
    unadapted_teacher,
)
from hf_distill.recipes.stages.stage import Run
from hf_distill.reporting.formatting import compact
from hf_distill.training.checkpoints import last_complete_checkpoint
from hf_distill.training.on_policy import WRITTEN_ROWS, OnPolicyArguments
from hf_distill.training.trainer import DistillationTrainer

# The settings of the divergence that a training logs, by which the report knows what to overlay.
DIVERGENCE = ("divergence", "temperature", "beta", "skew")


def train_teacher(run: Run, result: Path) -> None:
    """`teacher/`: the teacher's config or model, trained on the rows with cross-entropy only."""
    run.from_main(lambda: check_student(run.recipe))  # it may have changed since `prepare`
    _train(run, result, teacher_to_train, None, teacher_options(run.recipe))
    if (result / "adapter_config.json").exists():
        run.from_main(lambda: merge_adapter(unadapted_teacher(run, dtype="float32"), result))


def train_baseline(run: Run, result: Path) -> None:
    """`baseline/`: the student's training with cross-entropy only, all else equal."""
    # With alpha 0 the teacher runs in evaluations only, for the curve of the divergence.
    given, generates = arguments(run.recipe.train), OnPolicyArguments.names()
    data_only = {name: value for name, value in given.items() if name not in generates}
    data_only |= {"alpha": 0.0, "features": None}
    _train_student(run, result, data_only, rows_of_baseline)


def distil_off_policy(run: Run, result: Path) -> None:
    """`off_policy/`: a distillation on the data rows, from which `distil` goes on."""
    assert run.recipe.off_policy is not None
    options = arguments(run.recipe.off_policy)
    _train_student(run, result, options, rows_to_train, merge=False)


def distil(run: Run, result: Path) -> None:
    """`student/`: the distillation itself."""
    options = arguments(run.recipe.train)
    _train_student(run, result, options, rows_to_train, after_off_policy=True)


def _train_student(
    run: Run,
    result: Path,
    options: dict[str, Any],
    rows_from: Callable[[Run, str], Dataset],
    *,
    after_off_policy: bool = False,
    merge: bool = True,
) -> None:
    """Train the student, with its adapters if it has some.

    after_off_policy: go on from the student of the `off_policy` stage, if there is one
    merge: merge adapters where the recipe says so
    """
    teacher: str | None = None
    writes = bool(options.get("on_policy") or options.get("on_policy_raise"))
    if run.recipe.record is None or writes:
        teacher, kwargs = teacher_source(run)
        placement = run.recipe.teacher.placement
        options = options | {"teacher_model_kwargs": kwargs, "teacher_placement": placement}
    goes_on = after_off_policy and run.recipe.off_policy is not None
    make = student_to_train_on if goes_on else student_to_train
    _train(run, result, make, teacher, options, rows_from=rows_from)
    lora = run.recipe.student.lora
    if lora is not None and lora.merge and merge:
        run.from_main(lambda: merge_adapter(student_initial(run), result))


def _train(
    run: Run,
    result: Path,
    make_model: Callable[[Run], Any],
    teacher: str | None,
    options: dict[str, Any],
    *,
    rows_from: Callable[[Run, str], Dataset] = rows_of,
) -> None:
    """Train, from the last complete checkpoint if there is one; save model, tokenizer and log."""
    recipe, tokenizer = run.recipe, tokenizer_of(run)
    checkpoints = result.parent / "checkpoints"
    # First, since under ZeRO-3 it decides that the student's weights are read in shards.
    args = training_arguments(recipe, options, checkpoints)
    model = make_model(run)
    rows = rows_from(run, "train")
    require_rows(rows, args.train_batch_size * args.world_size, "one batch")
    clock = Clock()
    trainer = DistillationTrainer(
        model,
        model if teacher is not None and teaches_itself(recipe) else teacher,
        args,
        teacher_tokenizer=teacher_tokenizer_of(run) if teacher is not None else None,
        train_dataset=rows,
        eval_dataset=_evaluation_rows(run, rows_from),
        processing_class=tokenizer,
        data_collator=collator_of(recipe, tokenizer),
        callbacks=[clock],
    )
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(Bar)
    # ZeRO-3 keeps an empty tensor in a parameter's place, and its size beside it.
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    accumulated, processes = args.gradient_accumulation_steps, args.world_size
    rows_a_step = args.train_batch_size * accumulated * processes
    split = f" ({args.train_batch_size} at a time, {accumulated} times)" if accumulated > 1 else ""
    split += f" on {processes} processes" if processes > 1 else ""
    run.log(f"  {compact(trained)} parameters, {len(rows):,} rows, {rows_a_step} a step{split}")
    resume = last_complete_checkpoint(checkpoints)
    if resume:
        run.log(f"  resuming from {Path(resume).name}")
    PeakMemory.forget()
    trainer.train(resume_from_checkpoint=resume)
    peak = trainer.accelerator.reduce(
        torch.tensor([float(PeakMemory.peak())], device=args.device), "max"
    )
    trainer.save_model(str(result))
    if trainer.is_world_process_zero():
        (result / "log_history.json").write_text(json.dumps(trainer.state.log_history))
        engine = trainer.accelerator.distributed_type.value
        # The student writes before a step begins.
        writing = sum(entry.get("writing_seconds", 0.0) for entry in trainer.state.log_history)
        seconds = round(clock.seconds + writing, 2)
        facts: dict[str, Any] = {"train_seconds": seconds, "engine": engine}
        facts["peak_memory_mb"] = round(peak.item() / MB)
        facts["divergence"] = [getattr(args, name) for name in DIVERGENCE]
        (result / "training_results.json").write_text(json.dumps(facts))
        if args.keep_rows and (checkpoints / WRITTEN_ROWS).exists():
            # Not moved: after an interruption here the training resumes with its earlier rows.
            shutil.copyfile(checkpoints / WRITTEN_ROWS, result / WRITTEN_ROWS)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
    # The next training sets up its own engine (DeepSpeed keeps the first one's settings).
    AcceleratorState._reset_state()


def _evaluation_rows(
    run: Run, rows_from: Callable[[Run, str], Dataset]
) -> Dataset | dict[str, Dataset]:
    """The evaluation rows; a dictionary, as Trainer takes it, where they are sets with names."""
    splits = run.recipe.data.eval_splits
    if splits == ("eval",):
        return rows_from(run, "eval")
    return {split.removeprefix("eval/"): rows_from(run, split) for split in splits}


class Bar(ProgressCallback):
    """Trainer's progress bar, with the last loss beside it instead of a dictionary a line."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


class Clock(TrainerCallback, ExportableState):
    """Seconds spent in steps, without evaluations and checkpoints, kept over interruptions.

    The figure is stored in each checkpoint's `trainer_state.json`.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"seconds": self.seconds}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        kept = state.stateful_callbacks.get(type(self).__name__) or self.state()
        self.seconds = kept["attributes"]["seconds"] if state.global_step else 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds += time.perf_counter() - self._start
