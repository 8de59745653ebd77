"""Stage `record`: record the teacher over the rows, so that trainings run without it."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from datasets import Dataset

from hf_distill.errors import InputError
from hf_distill.evaluation.performance import MB
from hf_distill.recipes import Recipe, arguments
from hf_distill.recipes.stages.given_models import check_student
from hf_distill.recipes.stages.models import (
    accelerator_of,
    collator_of,
    rows_to_learn,
    teacher_source,
    tokenizer_of,
)
from hf_distill.recipes.stages.stage import Run
from hf_distill.recordings.recorder import Estimate, estimate, load_recording, record
from hf_distill.recordings.writer import RecordingSettings
from hf_distill.teachers import Teacher, as_teacher

# The folders of a recording. Several evaluation sets are folders in the second.
SPLITS = ("train", "eval")


def settings_of(recipe: Recipe) -> RecordingSettings:
    """What the recipe records, at the temperature that it trains with."""
    section = recipe.record
    assert section is not None
    temperature = arguments(recipe.train)["temperature"]
    return RecordingSettings(section.kind, section.k, section.draws, temperature, recipe.seed)


def record_teacher(run: Run, result: Path) -> None:
    """`recording/`: train/ and eval/, each a folder of Arrow shards with its manifest."""
    run.from_main(lambda: check_student(run.recipe))  # it may have changed since `prepare`
    section = run.recipe.record
    assert section is not None
    tokenizer, accelerator = tokenizer_of(run), accelerator_of(run)
    teacher = _teacher(run)
    settings = vars(settings_of(run.recipe))
    for split in ("train", *run.recipe.data.eval_splits):
        # Beside the result, which is emptied when an interrupted stage goes on.
        record(
            _rows(run, split),
            teacher,
            result.parent / split,
            tokenizer=tokenizer,
            data_collator=collator_of(run.recipe, tokenizer),
            batch_size=section.batch_size,
            shard_rows=section.shard_rows,
            accelerator=accelerator,
            **settings,
        )
    run.state.wait_for_everyone()  # the others may still be opening what is moved away here
    run.from_main(lambda: _move(result))
    recorded = load_recording(result / "train")
    size = sum(path.stat().st_size for path in result.rglob("*.arrow"))
    run.log(f"  {len(recorded):,} rows, {size / MB:,.0f} MB on disk, tokens included")
    accelerator.free_memory()
    del teacher
    gc.collect()
    AcceleratorState._reset_state()


def check_records(recipe: Recipe) -> None:
    """InputError for a recipe without a `record` section."""
    if recipe.record is None:
        raise InputError(
            "the recipe has no 'record' section, so there is nothing to record: add one, or "
            "--set record.k=64"
        )


def estimate_recording(run: Run) -> Estimate:
    """Estimate the stage from a timed sample of the training rows."""
    section = run.recipe.record
    assert section is not None
    tokenizer = tokenizer_of(run)
    return estimate(
        _rows(run, "train"),
        _teacher(run),
        tokenizer=tokenizer,
        data_collator=collator_of(run.recipe, tokenizer),
        batch_size=section.batch_size,
        accelerator=accelerator_of(run),
        settings=settings_of(run.recipe),
    )


def _rows(run: Run, split: str) -> Dataset:
    """The rows to record; a sample of the training rows if the recipe limits them."""
    rows, section = rows_to_learn(run, split), run.recipe.record
    assert section is not None
    if split != "train" or section.max_rows is None or section.max_rows >= len(rows):
        return rows
    return rows.shuffle(seed=run.recipe.seed).select(range(section.max_rows))


def _teacher(run: Run) -> Teacher:
    name, kwargs = teacher_source(run)
    teacher = as_teacher(
        name, task=run.recipe.task, placement=run.recipe.teacher.placement, **kwargs
    )
    assert teacher is not None  # there is a name
    return teacher


def _move(result: Path) -> Any:
    result.mkdir()
    for split in SPLITS:
        (result.parent / split).rename(result / split)
