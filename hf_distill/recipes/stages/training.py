"""Stages `teacher`, `baseline` and `train`: the same training with other teachers and weights."""

from __future__ import annotations

import gc
import json
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
from hf_distill.recipes import PretrainSection, arguments
from hf_distill.recipes.stages.inputs import training_arguments
from hf_distill.recipes.stages.models import (
    collator_of,
    merged,
    new_model,
    pretrained,
    rows_of,
    rows_to_train,
    student_to_train,
    student_to_train_on,
    teacher_source,
    teacher_tokenizer_of,
    teaches_itself,
    tokenizer_of,
)
from hf_distill.recipes.stages.stage import Run
from hf_distill.reporting.formatting import compact
from hf_distill.training.checkpoints import last_complete_checkpoint
from hf_distill.training.on_policy import WRITTEN_ROWS
from hf_distill.training.trainer import DistillationTrainer

# The settings of the divergence that a training logs, by which the report knows what to overlay.
DIVERGENCE = ("divergence", "temperature", "beta", "skew")


def train_teacher(run: Run, result: Path) -> None:
    """`teacher/`: the teacher's config or model, trained on the rows with cross-entropy only."""
    section = run.recipe.teacher
    options = arguments(section.train or PretrainSection()) | {"alpha": 0.0}

    def make(run: Run) -> Any:
        if section.config is None:
            return pretrained(run, "teacher")
        return new_model(run, section.config)

    _train(run, result, make, None, options)


def train_baseline(run: Run, result: Path) -> None:
    """`baseline/`: the student's training with cross-entropy only, all else equal."""
    # With alpha 0 the teacher runs in evaluations only, for the curve of the divergence.
    data_only = {"alpha": 0.0, "on_policy": 0.0, "on_policy_raise": 0.0}
    _train_student(run, result, arguments(run.recipe.train) | data_only)


def distil_off_policy(run: Run, result: Path) -> None:
    """`off_policy/`: a distillation on the data rows, from which `distil` goes on."""
    assert run.recipe.off_policy is not None
    _train_student(run, result, arguments(run.recipe.off_policy), merge=False)


def distil(run: Run, result: Path) -> None:
    """`student/`: the distillation itself."""
    _train_student(run, result, arguments(run.recipe.train), after_off_policy=True)


def _train_student(
    run: Run,
    result: Path,
    options: dict[str, Any],
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
    _train(run, result, make, teacher, options, rows_from=rows_to_train)
    lora = run.recipe.student.lora
    if lora is not None and lora.merge and merge:
        run.from_main(lambda: _merge(run, result))


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
        eval_dataset=rows_from(run, "eval"),
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
        facts: dict[str, Any] = {"train_seconds": round(clock.seconds, 2), "engine": engine}
        facts["peak_memory_mb"] = round(peak.item() / MB)
        facts["divergence"] = [getattr(args, name) for name in DIVERGENCE]
        (result / "training_results.json").write_text(json.dumps(facts))
        if args.keep_rows and (checkpoints / WRITTEN_ROWS).exists():
            (checkpoints / WRITTEN_ROWS).replace(result / WRITTEN_ROWS)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
    # The next training sets up its own engine (DeepSpeed keeps the first one's settings).
    AcceleratorState._reset_state()


def _merge(run: Run, result: Path) -> None:
    """Replace the adapter in a folder by the merged model."""
    model = merged(run, result)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (result / name).unlink()
    model.save_pretrained(result)


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
