"""`record`: run the teacher once over a data set and store its outputs in the rows.

The rows are written in shards. A shard is written under another name and renamed when it is
complete, so that a kill loses at most one shard per process. A second call resumes and ends with
the same bytes. Under `accelerate launch` the processes divide the shards among them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from datasets import Dataset, load_dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.errors import InputError
from hf_distill.models.engines import one_accelerator
from hf_distill.models.loading import not_found
from hf_distill.recordings.collator import header_of
from hf_distill.recordings.filling import Bar, fill, in_cache, names_of, on_main_first
from hf_distill.recordings.row_format import COLUMN
from hf_distill.recordings.shards import (
    MANIFEST,
    check_same_rows,
    claim,
    finish,
    load_shards,
    write_shard,
)
from hf_distill.recordings.writer import RecordingSettings, RecordingWriter
from hf_distill.teachers import Teacher

__all__ = ["Estimate", "RecordingSettings", "estimate", "load_recording", "record"]


def record(
    dataset: Any,
    teacher: PreTrainedModel | Teacher | str,
    output_dir: str | Path | None = None,
    *,
    kind: str = "top_k",
    k: int = 64,
    draws: int = 50,
    temperature: float = 1.0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    batch_size: int = 8,
    shard_rows: int = 1000,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    teacher_placement: str = "auto",
    **teacher_model_kwargs: Any,
) -> Dataset:
    """Return the same rows with one more column, the teacher's outputs at their targets.

    dataset: a `datasets.Dataset` or `IterableDataset` of rows as they will be trained on:
        tokenized, packed and masked. A stream is held in memory one shard at a time
    teacher: a model, an id or path, or an object with the `Teacher` protocol
    output_dir: where the shards are stored; by default a folder of the datasets cache, named after
        settings, teacher and rows. After an interruption, call it again with the same arguments
    kind, k, draws, temperature, seed: see `RecordingSettings`
    tokenizer: that of the rows; compared with the student's in training, and used for padding if
        there is no data_collator
    data_collator: the collator of the later training, if it makes the labels
    batch_size: rows at a time on each process, of similar length
    teacher_placement: see `DistillationArguments`; teacher_model_kwargs: for `from_pretrained`
    returns: a memory-mapped `Dataset`, the same on every process
    raises: InputError for settings, rows or a folder that cannot be used, and for a full disk
    """
    settings = RecordingSettings(kind, k, draws, temperature, seed)
    with one_accelerator(accelerator) as accelerator:
        writer = RecordingWriter(
            settings,
            teacher,
            tokenizer,
            data_collator,
            accelerator,
            teacher_placement,
            teacher_model_kwargs,
        )
        writer.check_columns(names_of(dataset))
        folder = Path(output_dir) if output_dir else in_cache(dataset, writer.identity, shard_rows)
        identity = writer.identity | {"shard_rows": shard_rows}
        on_main_first(accelerator, lambda: claim(folder, identity))
        shards = _fill(folder, writer, dataset, shard_rows, batch_size, accelerator)
        accelerator.wait_for_everyone()
        on_main_first(accelerator, lambda: finish(folder, writer, shards))
    return load_recording(folder)


def _fill(
    folder: Path,
    writer: RecordingWriter,
    dataset: Any,
    shard_rows: int,
    batch_size: int,
    accelerator: Accelerator,
) -> int:
    """Write the missing shards of this process; returns the number of shards in all."""
    together = getattr(writer.teacher, "together", False)
    batches = math.ceil(shard_rows / batch_size) if together else 0
    bar = Bar(dataset, accelerator, "record", "targets", "bytes/target")

    def write(rows: Dataset, path: Path, index: int) -> None:
        write_shard(writer, rows, path, index, batch_size, bar.report, batches)

    def idle(rows: Dataset) -> None:
        writer.values(rows.to_list()[:1], batch_size, seed=0, batches=batches)

    return fill(
        folder,
        dataset,
        shard_rows,
        accelerator,
        bar,
        write=write,
        check=check_same_rows,
        idle=idle if together else None,
    )


def load_recording(id_or_path: str | Path, split: str = "train", **kwargs: Any) -> Dataset:
    """Load a recording from the `output_dir` of `record`, or from the Hub.

    split, kwargs: for `datasets.load_dataset`, if it is on the Hub
    raises: InputError for a recording that cannot be found or is not complete
    """
    folder = Path(id_or_path)
    if not folder.exists():
        try:
            dataset = load_dataset(str(id_or_path), split=split, **kwargs)
        except (OSError, ValueError) as error:
            raise InputError(not_found("recording", id_or_path, error)) from error
        if COLUMN not in dataset.column_names:
            raise InputError(
                f"{str(id_or_path)!r} has no column {COLUMN!r}: give a data set made by record"
            )
        return dataset
    return load_shards(folder, MANIFEST, "recording", "record")


@dataclass(frozen=True)
class Estimate:
    """The size and time of a recording, from a timed sample.

    targets: of the whole data set; bytes: all of the recording column; seconds: on this machine
        with as many processes as asked
    """

    rows: int
    targets: int
    bytes: int
    seconds: float
    bytes_per_target: float
    targets_per_second: float


def estimate(
    dataset: Dataset,
    teacher: PreTrainedModel | Teacher | str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    batch_size: int = 8,
    sample_rows: int = 64,
    accelerator: Accelerator | None = None,
    settings: RecordingSettings | None = None,
    teacher_placement: str = "auto",
    **teacher_model_kwargs: Any,
) -> Estimate:
    """Time and size of `record`, from a few rows spread over the data set."""
    with one_accelerator(accelerator) as accelerator:
        writer = RecordingWriter(
            settings or RecordingSettings(),
            teacher,
            tokenizer,
            data_collator,
            accelerator,
            teacher_placement,
            teacher_model_kwargs,
        )
        if len(dataset) == 0:
            raise InputError("there are no rows to record: the data set is empty")
        writer.check_columns(names_of(dataset))
        number = min(sample_rows, len(dataset))
        sample = [dataset[i * len(dataset) // number] for i in range(number)]
        warm_up = sample[:batch_size]
        writer.values(warm_up, batch_size, seed=0)
        start = time.perf_counter()
        values = writer.values(sample, batch_size, seed=0)
        seconds = time.perf_counter() - start
        targets = sum(header_of(value, "a sampled row").targets for value in values)
        size, scale = sum(map(len, values)), len(dataset) / number
        return Estimate(
            rows=len(dataset),
            targets=round(targets * scale),
            bytes=round(size * scale),
            seconds=seconds * scale / accelerator.num_processes,
            bytes_per_target=size / max(targets, 1),
            targets_per_second=targets * accelerator.num_processes / seconds,
        )
