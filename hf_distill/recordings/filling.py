"""Fill a folder with shards: over several processes, resumed after a kill, with a progress bar."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import datasets
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from tqdm.auto import tqdm

from hf_distill.errors import InputError
from hf_distill.recordings.shards import full_disk, shard_name, shards_of

T = TypeVar("T")


def fill(
    folder: Path,
    dataset: Any,
    shard_rows: int,
    accelerator: Accelerator,
    bar: Bar,
    *,
    write: Callable[[Dataset, Path, int], None],
    check: Callable[[Path, Dataset], None],
    idle: Callable[[Dataset], None] | None = None,
) -> int:
    """Write the missing shards of this process; returns the number of shards in all.

    write: called with the rows of a shard, its path and its index
    check: called with the path of a finished shard and its rows; raises where they do not fit
    idle: given for a sharded teacher, which all processes have to run together. They write in
        rounds; a process without a shard left calls it with some rows.
    raises: InputError for a data set without rows, and for a full disk
    """
    whole = broadcast(accelerator, {path.name for path in folder.glob("shard-*.arrow")})
    number = missing = 0
    mine: tuple[Dataset, int] | None = None
    any_rows: Dataset | None = None

    def write_mine() -> None:
        nonlocal mine
        if mine is not None:
            rows, index = mine
            with full_disk(folder):
                write(rows, folder / shard_name(index), index)
        elif any_rows is not None and idle is not None:
            idle(any_rows)
        mine = None

    for number, rows in enumerate(shards_of(dataset, shard_rows), 1):
        path = folder / shard_name(number - 1)
        if path.name in whole:
            check(path, rows)
            bar.skip(len(rows))
            continue
        turn, any_rows = missing % accelerator.num_processes, rows
        missing += 1
        if turn == accelerator.process_index:
            mine = rows, number - 1
        if (turn == accelerator.num_processes - 1) if idle else (mine is not None):
            write_mine()
    if idle and missing % accelerator.num_processes:
        write_mine()
    bar.close()
    if number == 0:
        raise InputError(f"there are no rows to {bar.verb}: the data set is empty")
    return number


def names_of(dataset: Any) -> list[str]:
    """The columns of a data set, a stream or a list of rows; none if there are no rows."""
    if getattr(dataset, "column_names", None) is not None:
        return list(dataset.column_names)
    return list(next(iter(dataset), {}))


def in_cache(dataset: Any, identity: Any, shard_rows: int) -> Path:
    """A folder of the datasets cache, named after all that decides the shards."""
    decided = [identity, shard_rows, getattr(dataset, "_fingerprint", None)]
    if decided[-1] is None:
        raise InputError("a stream has no fingerprint: give an output_dir for its shards")
    name = hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:16]
    return Path(datasets.config.HF_DATASETS_CACHE) / "hf_distill" / name


def broadcast(accelerator: Accelerator, value: T) -> T:
    """The value of the main process, on all processes."""
    shared = [value]
    if accelerator.num_processes > 1:
        broadcast_object_list(shared)
    return shared[0]


def on_main_first(accelerator: Accelerator, action: Callable[[], None]) -> None:
    """Run an action on the main process while the others wait; its error ends all of them."""
    outcome: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            action()
        except InputError as error:
            outcome = [str(error)]
    message = broadcast(accelerator, outcome[0])
    if message is not None:
        raise InputError(message)


class Bar:
    """A progress bar over rows with a speed of its own, such as targets a second.

    verb: what is done to the rows ("record"); unit: what the speed counts
    per_unit: what `report` gives beside the units, shown as its mean ("bytes/target"), or ""
    """

    def __init__(
        self, dataset: Any, accelerator: Accelerator, verb: str, unit: str, per_unit: str
    ) -> None:
        self.processes, self.verb = accelerator.num_processes, verb
        self.unit, self.per_unit = unit, per_unit
        rows = len(dataset) if hasattr(dataset, "__len__") else None
        shown = accelerator.is_main_process
        self.bar = tqdm(total=rows, desc=verb, unit="row", disable=not shown)
        self.start = time.perf_counter()
        self.units = self.size = 0

    def skip(self, rows: int) -> None:
        """Count rows that were there before; they are left out of the speed."""
        if not self.bar.disable:
            self.bar.initial += rows
            self.bar.update(rows)

    def report(self, rows: int, units: int, size: int = 0) -> None:
        """Count a batch of this process. The others are about as far."""
        self.units += units
        self.size += size
        speed = self.units * self.processes / (time.perf_counter() - self.start)
        shown = f"{speed:,.0f} {self.unit}/s"
        if self.per_unit:
            shown += f", {self.size / max(self.units, 1):.0f} {self.per_unit}"
        self.bar.set_postfix_str(shown, refresh=False)
        left = (self.bar.total or 2**62) - self.bar.n
        self.bar.update(min(rows * self.processes, left))

    def close(self) -> None:
        """End the bar."""
        self.bar.close()
