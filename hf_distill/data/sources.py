"""Resolve the files, globs and folders of a recipe to a list of files."""

from __future__ import annotations

import contextlib
import csv
import glob
import io
import itertools
import re
import sysconfig
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import fsspec

from hf_distill.errors import InputError

COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
_KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
_DELIMITERS = ",;\t|"
_NO_DELIMITER = "\x1f"  # the unit separator
_HEAD = 1 << 20
_ROWS = 20
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_TEXT = (".txt", ".text", ".md", ".rst", ".py")


def kind_of(path: Path) -> str:
    """How ``datasets`` reads the file: json, csv, tsv, parquet, or text for anything else."""
    return _KINDS.get(_inner_suffix(path), "text")


def delimiter_of(path: Path) -> str:
    """The delimiter of a CSV file: comma, semicolon, tab or bar.

    It is the one that splits the header and gives the most of the first rows as many values. Where
    there is none, the file has one column; the answer is then a character that no text holds, so
    that a comma in the text does not split it.
    raises: InputError if a row has more values than the header
    """
    try:
        with fsspec.open(
            str(path), "rt", compression="infer", encoding="utf-8-sig", newline=""
        ) as file:
            head = file.read(_HEAD)
    # Decompressors each raise their own types. The reader of the rows reports damaged files.
    except Exception:
        return ","
    best, fitting = _NO_DELIMITER, 0
    for delimiter in _DELIMITERS:
        rows = _first_rows(head, delimiter)
        if len(rows[0]) < 2:
            continue
        fits = sum(len(row) == len(rows[0]) for row in rows[1:])
        if fits > fitting or (best == _NO_DELIMITER and len(rows) == 1):
            best, fitting = delimiter, fits
    if best != _NO_DELIMITER:
        rows = _first_rows(head, best)
        for number, row in enumerate(rows[1:], start=2):
            if len(row) > len(rows[0]):
                raise InputError(
                    f"{path}: row {number} has {len(row)} values, but the header has "
                    f"{len(rows[0])} (separated by {best!r}): quote values that hold {best!r}"
                )
    return best


def _first_rows(head: str, delimiter: str) -> list[list[str]]:
    """The header and the next rows, without empty values that a row has beyond the header."""
    reader = csv.reader(io.StringIO(head, newline=""), delimiter=delimiter)
    rows: list[list[str]] = []
    with contextlib.suppress(csv.Error):  # a value that is too long for the module
        rows.extend(row for row in itertools.islice(reader, _ROWS) if row)
    if len(head) == _HEAD and len(rows) > 1 and len(rows) < _ROWS:
        rows.pop()  # the end of the head cuts it
    width = len(rows[0]) if rows else 0
    return [row[:width] if not any(row[width:]) else row for row in rows] or [[]]


def expand(place: str) -> str:
    """The place with ``{stdlib}`` and ``~`` filled in."""
    filled = place.replace("{stdlib}", sysconfig.get_path("stdlib"))
    return str(Path(filled).expanduser())


def hub_id(places: Sequence[str]) -> str | None:
    """The id, if there is one place and it can only be the id of a Hub data set; else None.

    An id is ``name`` or ``owner/name``, does not exist as a file, and has no suffix of a data file.
    """
    if len(places) != 1:
        return None
    place = places[0]
    if not _HUB_ID.fullmatch(place) or Path(place).exists():
        return None
    suffix = _inner_suffix(Path(place))
    return None if suffix in _KINDS or suffix in _TEXT else place


def find_files(places: Iterable[str], exclude: Iterable[str]) -> list[Path]:
    """The files of all places, each once, in order of place and name, without empty ones.

    raises: InputError for a place that gives no file, or a file named outright that is empty
    """
    patterns = [_anywhere(expand(pattern)) for pattern in exclude]
    found: dict[Path, None] = {}
    for place in places:
        path = Path(expand(place))
        files = [file for file in _candidates(path) if not _excluded(file, patterns)]
        if not files:
            raise InputError(_nothing(place, path))
        filled = [file for file in files if file.stat().st_size]
        if not filled:
            what = "is empty" if path.is_file() else "matches only empty files"
            raise InputError(f"{place!r} {what}: give files with text in them")
        found.update(dict.fromkeys(filled))
    return list(found)


def _candidates(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = (Path(name) for name in glob.glob(f"{glob.escape(str(path))}/**", recursive=True))
        return sorted(file for file in inside if file.is_file() and _is_data(file))
    return sorted(
        Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()
    )


def _nothing(place: str, path: Path) -> str:
    if path.is_dir():
        return f"folder {place!r} holds no data file (txt, jsonl, csv, parquet, ...) to read"
    if path.is_file():
        return f"{place!r} is also in data.exclude: nothing is left of it"
    if glob.has_magic(str(path)):
        return f"{place!r} matches no file: check the pattern, the folder and data.exclude"
    return f"{place!r} does not exist: give a file, a glob, a folder or a Hub data set id"


def _is_data(path: Path) -> bool:
    suffix = _inner_suffix(path)
    return suffix in _KINDS or suffix in _TEXT


def _inner_suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


def _anywhere(pattern: str) -> str:
    return pattern if pattern.startswith(("/", "*")) else f"*/{pattern}"


def _excluded(file: Path, patterns: Sequence[str]) -> bool:
    name = file.absolute().as_posix()
    return any(fnmatchcase(name, pattern) for pattern in patterns)
