"""The files of `record` and `annotate`: shards, complete when they appear, and a manifest."""

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
from textwrap import shorten
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, Value, concatenate_datasets
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


def arrow_table(rows: Dataset) -> Any:
    """The rows as a `pyarrow.Table`."""
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
    """Record the rows of one shard and write it.

    report, batches: see `RecordingWriter.values`
    """
    plain: list[Mapping[str, Any]] = rows.with_format(None).to_list()
    seed = recorder.settings.seed * 1_000_003 + index
    values = recorder.values(plain, batch_size, seed=seed, report=report, batches=batches)
    features = Features({**rows.features, COLUMN: Value("large_binary")})
    table = arrow_table(rows).append_column(COLUMN, pa.array(values, pa.large_binary()))
    targets = sum(header_of(value, "a row").targets for value in values)
    counts = {"rows": len(values), "targets": targets, "bytes": sum(map(len, values))}
    write_table(path, table, features, counts | {"rounding": recorder.rounding})


def write_table(path: Path, table: Any, features: Features, counts: dict[str, Any]) -> None:
    """Write a shard and its counts; it gets its name when both are complete."""
    partial = path.with_name(path.name + ".partial")
    with ArrowWriter(path=str(partial), features=features) as writer:
        writer.write_table(table)
        writer.finalize()
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    write_whole(path.with_suffix(".json"), json.dumps(counts))
    partial.replace(path)


def check_same_rows(path: Path, rows: Dataset) -> None:
    """InputError if a finished shard holds other rows than the data set has now."""
    there = arrow_table(Dataset.from_file(str(path)).remove_columns(COLUMN))
    here = arrow_table(rows)
    if not there.equals(
        here.cast(there.schema) if here.schema.names == there.schema.names else here
    ):
        raise InputError(
            f"{path.name} in {str(path.parent)!r} was recorded from other rows: "
            "give another output_dir, or remove that folder"
        )


def claim(folder: Path, identity: dict[str, Any], what: str = "a recording") -> None:
    """Take a folder for some shards; InputError if it holds other ones or other files."""
    path = folder / SETTINGS
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key in identity if identity[key] != earlier.get(key)]
        if changed:
            name, there, wanted = _difference(
                changed[0], earlier.get(changed[0]), identity[changed[0]]
            )
            raise InputError(
                f"{str(folder)!r} holds {what} with {name} {there}, not {wanted}: give another "
                "output_dir, or remove that folder"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise InputError(f"{str(folder)!r} has other files in it: give an empty output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.partial"):
        leftover.unlink()
    write_whole(path, json.dumps(identity, indent=2))


def _difference(name: str, there: Any, wanted: Any) -> tuple[str, str, str]:
    """What two settings differ in, as name and values that fit into one line."""
    if isinstance(there, dict) and isinstance(wanted, dict):
        keys = [key for key in {**wanted, **there} if wanted.get(key) != there.get(key)]
        return _difference(f"{name}.{keys[0]}", there.get(keys[0]), wanted.get(keys[0]))
    short_there, short_wanted = (shorten(repr(v), 80, placeholder=" ...") for v in (there, wanted))
    return name, short_there, short_wanted


def load_shards(folder: Path, manifest: str, what: str, function: str) -> Dataset:
    """The rows of a finished folder, memory-mapped.

    manifest: the file that marks it as finished; what, function: what the folder holds, and what
        makes it, for the error
    raises: InputError for a folder that is not complete
    """
    try:
        shards = json.loads((folder / manifest).read_text(encoding="utf-8"))["shards"]
    except (OSError, ValueError):
        raise InputError(
            f"{str(folder)!r} holds no complete {what}, since it has no readable {manifest}: "
            f"run `{function}` again to continue it"
        ) from None
    paths = [folder / shard_name(index) for index in range(shards)]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise InputError(
            f"{str(folder)!r} lacks {missing[0]}: run `{function}` again to restore it"
        )
    return concatenate_datasets([Dataset.from_file(str(path)) for path in paths])


def shard_counts(folder: Path, shards: int) -> list[dict[str, Any]]:
    """The counts that were written with each shard."""
    paths = [(folder / shard_name(index)).with_suffix(".json") for index in range(shards)]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def finish(folder: Path, recorder: RecordingWriter, shards: int) -> None:
    """Write the manifest and the card, which mark the recording as complete."""
    parts = shard_counts(folder, shards)
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
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=2))


def write_card(folder: Path, manifest: dict[str, Any]) -> None:
    """Write `README.md`, the recording's card on the Hub."""
    template = (files("hf_distill.recordings") / "card.md.jinja").read_text("utf-8")
    text = Template(template, undefined=StrictUndefined, keep_trailing_newline=True)
    write_whole(folder / "README.md", text.render(**manifest))


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is complete as soon as it is there."""
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
            f"the disk with {str(folder)!r} is full; {whole} finished shards are kept: free disk "
            "space, and run the same command again"
        ) from error
