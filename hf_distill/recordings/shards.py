"""The files of a recording: Arrow shards, each complete when it appears, and the manifest."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, Value
from datasets.arrow_writer import ArrowWriter
from jinja2 import StrictUndefined, Template

from hf_distill.errors import InputError
from hf_distill.recordings.collator import header_of
from hf_distill.recordings.row_format import COLUMN
from hf_distill.recordings.writer import RecordingWriter

MANIFEST = "recording.json"
SETTINGS = "settings.json"


def shard_name(index: int) -> str:
    """The file name of a shard, by its index."""
    return f"shard-{index:06}.arrow"


def shards_of(dataset: Any, size: int) -> Iterator[Dataset]:
    """Consecutive parts of the rows. Of a stream, one part at a time is in memory."""
    if COLUMN in (getattr(dataset, "column_names", None) or ()):
        dataset = dataset.remove_columns(COLUMN)
    if isinstance(dataset, Dataset):
        for at in range(0, len(dataset), size):
            yield dataset.select(range(at, min(at + size, len(dataset))))
        return
    rows = iter(dataset)
    while part := list(islice(rows, size)):
        yield Dataset.from_list(part, features=getattr(dataset, "features", None))


def _table(rows: Dataset) -> Any:
    return rows.with_format("arrow")[:]


def write_shard(
    recorder: RecordingWriter,
    rows: Dataset,
    path: Path,
    index: int,
    batch_size: int,
    report: Callable[[int, int, int], None],
    batches: int = 0,
) -> None:
    """Write one shard; it gets its name when it is complete, after the file with its counts.

    report, batches: see `RecordingWriter.values`
    """
    plain: list[Mapping[str, Any]] = rows.with_format(None).to_list()
    seed = recorder.settings.seed * 1_000_003 + index
    values = recorder.values(plain, batch_size, seed=seed, report=report, batches=batches)
    features = Features({**rows.features, COLUMN: Value("large_binary")})
    table = _table(rows).append_column(COLUMN, pa.array(values, pa.large_binary()))
    partial = path.with_name(path.name + ".partial")
    with ArrowWriter(path=str(partial), features=features) as writer:
        writer.write_table(table)
        writer.finalize()
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    targets = sum(header_of(value, "a row").targets for value in values)
    counts = {"rows": len(values), "targets": targets, "bytes": sum(map(len, values))}
    _write_whole(path.with_suffix(".json"), json.dumps(counts | {"rounding": recorder.rounding}))
    partial.replace(path)


def check_same_rows(path: Path, rows: Dataset) -> None:
    """InputError if a finished shard holds other rows than the data set has now."""
    there, here = _table(Dataset.from_file(str(path)).remove_columns(COLUMN)), _table(rows)
    if not there.equals(
        here.cast(there.schema) if here.schema.names == there.schema.names else here
    ):
        raise InputError(
            f"{path.name} in {str(path.parent)!r} was recorded from other rows: "
            "give another output_dir, or remove that folder"
        )


def claim(folder: Path, identity: dict[str, Any]) -> None:
    """Take a folder for a recording; InputError if it holds another one or other files."""
    path = folder / SETTINGS
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key in identity if identity[key] != earlier.get(key)]
        if changed:
            raise InputError(
                f"{str(folder)!r} holds a recording with {changed[0]} {earlier.get(changed[0])!r}, "
                f"not {identity[changed[0]]!r}: give another output_dir, or remove that folder"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise InputError(f"{str(folder)!r} has other files in it: give an empty output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.partial"):
        leftover.unlink()
    _write_whole(path, json.dumps(identity, indent=2))


def finish(folder: Path, recorder: RecordingWriter, shards: int) -> None:
    """Write the manifest and the card, which mark the recording as complete."""
    parts = []
    for index in range(shards):
        path = (folder / shard_name(index)).with_suffix(".json")
        parts.append(json.loads(path.read_text(encoding="utf-8")))
    counts = {name: sum(part[name] for part in parts) for name in ("rows", "targets", "bytes")}
    roundings = [part["rounding"] for part in parts if part["rounding"] is not None]
    manifest = {
        **recorder.identity,
        "shards": shards,
        **counts,
        "bytes_per_target": round(counts["bytes"] / max(counts["targets"], 1), 2),
        "rounding": round(sum(roundings) / len(roundings), 6) if roundings else None,
        "versions": {name: version(name) for name in ("hf-distill", "torch", "transformers")},
    }
    write_card(folder, manifest)
    _write_whole(folder / MANIFEST, json.dumps(manifest, indent=2))


def write_card(folder: Path, manifest: dict[str, Any]) -> None:
    """Write `README.md`, the recording's card on the Hub."""
    template = (files("hf_distill.recordings") / "card.md.jinja").read_text("utf-8")
    text = Template(template, undefined=StrictUndefined, keep_trailing_newline=True)
    _write_whole(folder / "README.md", text.render(**manifest))


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Report a full disk in one line; finished shards stay."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC and "No space left" not in str(error):
            raise
        whole = len(list(folder.glob("shard-*.arrow")))
        for partial in folder.glob("*.partial"):
            partial.unlink(missing_ok=True)  # another process may be faster
        raise InputError(
            f"the disk with {str(folder)!r} is full; {whole} finished shards are kept: make room, "
            "and the same command goes on"
        ) from error
