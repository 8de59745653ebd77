"""Rows from files or from the Hub, as memory-mapped Arrow tables with agreed columns."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import datasets
import fsspec
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError

from hf_distill.data.config import DataConfig, Format
from hf_distill.data.forms import FORMS, find_form
from hf_distill.data.sources import delimiter_of, find_files, hub_id, kind_of
from hf_distill.errors import InputError

COLUMNS: dict[Format, tuple[str, ...]] = {
    "text": ("text",),
    "prompt_completion": ("prompt", "completion"),
    "chat_completion": ("prompt", "completion"),
    "chat": ("messages",),
}
_MESSAGES = List({"role": Value("string"), "content": Value("string")})
FEATURES: dict[Format, Any] = {
    "text": Value("string"),
    "prompt_completion": Value("string"),
    "chat_completion": _MESSAGES,
    "chat": _MESSAGES,
}  # of each column
_TEXT = ("string", "large_string")
_READ = 1 << 20


def collect(
    config: DataConfig, places: str | Sequence[str], split: str, work_dir: Path
) -> tuple[Dataset, Format, str]:
    """All rows of some places, under the column names of their format (``COLUMNS``).

    places: files, globs, folders, or one Hub id; split: of the Hub data set
    work_dir: where Arrow files are cached
    returns: the rows, their format, and which columns were converted, "" if none
    raises: InputError naming the place or file that is missing, empty, unreadable or malformed
    """
    places = [places] if isinstance(places, str) else list(places)
    if (name := hub_id(places)) is not None:
        return normalise(_from_hub(name, config, split, work_dir), config, name)
    parts: list[Dataset] = []
    formats: dict[Format, str] = {}
    mappings: dict[str, None] = {}
    for rows, where in _by_reader(config, places, work_dir):
        part, found, mapping = normalise(rows, config, where)
        parts.append(part)
        formats.setdefault(found, where)
        mappings |= {mapping: None} if mapping else {}
    if len(formats) > 1:
        listed = ", ".join(f"{name} ({where})" for name, where in formats.items())
        raise InputError(
            f"the files hold rows of different formats: {listed}; prepare each format by itself"
        )
    rows = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    if not len(rows):
        raise InputError(f"{', '.join(places)}: the files hold no row")
    return rows, next(iter(formats)), "; ".join(mappings)


def collect_columns(
    config: DataConfig, places: str | Sequence[str], split: str, work_dir: Path
) -> Dataset:
    """All rows of some places with the columns that they have. See `collect`.

    raises: InputError also where files have different columns
    """
    places = [places] if isinstance(places, str) else list(places)
    if (name := hub_id(places)) is not None:
        return _from_hub(name, config, split, work_dir)
    parts, origins = zip(*_by_reader(config, places, work_dir), strict=True)
    for rows, where in zip(parts, origins, strict=True):
        if set(rows.column_names) != set(parts[0].column_names):
            raise InputError(
                f"{where} has the columns {', '.join(rows.column_names)}, but {origins[0]} has "
                f"{', '.join(parts[0].column_names)}: prepare each by itself"
            )
    rows = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(list(parts))
    if not len(rows):
        raise InputError(f"{', '.join(places)}: the files hold no row")
    return rows


def _by_reader(
    config: DataConfig, places: Sequence[str], work_dir: Path
) -> Iterator[tuple[Dataset, str]]:
    """The rows of neighbouring files that are read alike, and the first of these files."""
    for kind, group in groupby(find_files(places, config.exclude), key=_reader):
        files = list(group)
        yield _from_files(kind, files, config, work_dir), str(files[0])


def normalise(rows: Dataset, config: DataConfig, where: str) -> tuple[Dataset, Format, str]:
    """The columns that the format needs, under their agreed names; all others are left out.

    Columns that the config names must be there. Otherwise the known forms are tried in their order.
    returns: the rows, their format, and the conversion as text, "" where nothing was converted
    """
    given: dict[Format, tuple[str, ...]] = {
        "chat": (config.messages_column,),
        "prompt_completion": (config.prompt_column, config.completion_column),
        "text": (config.text_column,),
    }
    # The formats of other tasks have readers of their own; a recipe refuses them here.
    only = None if config.format == "auto" else cast(Format, config.format)
    wanted = given if only is None else {only: given[only]}
    renamed = {name: columns for name, columns in wanted.items() if columns != COLUMNS[name]}
    for name, columns in renamed.items():
        if set(columns) <= set(rows.column_names):
            rows = rows.select_columns(list(columns))
            new = dict(zip(columns, COLUMNS[name], strict=True))
            rows = rows.rename_columns({old: to for old, to in new.items() if old != to})
            return _as_chat(*_finished(rows, name, where, ""), config)
    form = None if renamed else find_form(rows.column_names, only)
    if form is None:
        raise InputError(_unknown_columns(rows.column_names, renamed, only, where))
    mapping = form.described(rows.column_names)
    rows = rows.select_columns(form.present(rows.column_names))
    if form.convert is not None:
        try:
            rows = rows.map(
                form.read,
                batched=True,
                remove_columns=rows.column_names,
                features=Features(dict.fromkeys(COLUMNS[form.format], FEATURES[form.format])),
                num_proc=config.num_proc,
            )
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    return _as_chat(*_finished(rows, form.format, where, mapping), config)


def _as_chat(
    rows: Dataset, name: Format, mapping: str, config: DataConfig
) -> tuple[Dataset, Format, str]:
    """Prompts and completions of text as messages, where the config asks for it."""
    if not config.prompts_as_chat or name != "prompt_completion":
        return rows, name, mapping
    chats = rows.map(
        _turns,
        batched=True,
        features=Features(dict.fromkeys(COLUMNS["chat_completion"], _MESSAGES)),
        num_proc=config.num_proc,
    )
    return chats, "chat_completion", "; ".join(filter(None, (mapping, "turns of a chat")))


def _turns(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
    roles = {"prompt": "user", "completion": "assistant"}
    return {
        column: [[{"role": role, "content": text or ""}] for text in batch[column]]
        for column, role in roles.items()
    }


def _unknown_columns(
    names: list[str], renamed: dict[Format, tuple[str, ...]], only: Format | None, where: str
) -> str:
    listed = f"{where} has the columns {', '.join(names)}"
    if renamed:
        looked = " or ".join(" + ".join(columns) for columns in renamed.values())
        return f"{listed} but not {looked}, which data names: correct data.*_column"
    forms = [form for form in FORMS if only is None or form.format == only]
    known = ", ".join(" + ".join(form.columns) for form in forms)
    return (
        f"{listed} but not those of a known form ({known}): set data.text_column, "
        "data.prompt_column and data.completion_column, or data.messages_column"
    )


def _finished(rows: Dataset, name: Format, where: str, mapping: str) -> tuple[Dataset, Format, str]:
    """The rows with checked types; conversational prompts and completions have their own format."""
    columns = COLUMNS[name]
    if name == "prompt_completion" and not any(
        isinstance(rows.features[column], Value) for column in columns
    ):
        name = "chat_completion"
    if name in ("chat", "chat_completion"):
        for column in columns:
            _check_messages(rows.features[column], f"{where}: {column}")
        return rows, name, mapping
    for column in columns:
        dtype = getattr(rows.features[column], "dtype", None)
        if dtype not in _TEXT:
            raise InputError(
                f"{where}: column {column!r} holds {dtype or rows.features[column]}, not text: "
                "name the column that holds the text"
            )
    # Files may disagree between string and large_string; they must agree to be concatenated.
    wanted = Features({column: Value("string") for column in columns})
    return (rows if rows.features == wanted else rows.cast(wanted)), name, mapping


def _check_messages(feature: Any, what: str) -> None:
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else None)
    if not isinstance(inner, dict) or not {"role", "content"} <= set(inner):
        raise InputError(f"{what} must be a list of {{role, content}}, not {feature}")
    if getattr(inner["content"], "dtype", None) not in (*_TEXT, "null"):
        raise InputError(f"{what} must have text as content, not {inner['content']}")


def _reader(file: Path) -> tuple[str, str]:
    """How ``datasets`` reads the file, and for a CSV its delimiter."""
    kind = kind_of(file)
    if kind == "tsv":
        return "csv", "\t"
    return kind, delimiter_of(file) if kind == "csv" else ""


def _from_files(
    reader: tuple[str, str], files: list[Path], config: DataConfig, work_dir: Path
) -> Dataset:
    kind, delimiter = reader
    options: dict[str, Any] = {}
    if kind == "text":
        options["sample_by"] = config.rows
    elif kind == "csv":
        # Otherwise a delimiter at the end of rows makes their first value an index, and words such
        # as "null", "None" and "NA" have no text.
        options |= {"sep": delimiter, "index_col": False}
        options |= {"keep_default_na": False, "na_values": [""]}
    try:
        return _load(kind, files, work_dir, num_proc=config.num_proc, **options)
    # The type of a reader's error on a damaged file depends on format and compression.
    except (DatasetGenerationError, OSError, ValueError, EOFError) as error:
        raise InputError(_culprit(kind, files, work_dir, error, **options)) from error


def _load(
    kind: str, files: list[Path], work_dir: Path, num_proc: int | None = None, **options: Any
) -> Dataset:
    processes = min(num_proc or 1, len(files))
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the InputError says it
    try:
        rows = datasets.load_dataset(
            kind,
            data_files=[glob.escape(str(file.absolute())) for file in files],
            split="train",
            cache_dir=str(work_dir),
            num_proc=processes if processes > 1 else None,
            **options,
        )
    finally:
        datasets.logging.set_verbosity(level)
    return cast(Dataset, rows)


def _culprit(kind: str, files: list[Path], work_dir: Path, error: Exception, **options: Any) -> str:
    """Which file could not be read, and why: found by reading them one by one, after a failure."""
    for file in files:
        try:
            if kind != "parquet":
                _read_through(file)
            if kind != "text":
                _load(kind, [file], work_dir, **options)
        except UnicodeDecodeError as problem:
            return f"{file} is not UTF-8 text ({problem.reason}): convert it (iconv) or exclude it"
        # Decompressors and parsers each raise their own types on a damaged file.
        except Exception as problem:
            reason = _line(problem.__cause__ or problem)
            return f"{file} cannot be read as {kind} ({reason}): repair or exclude it"
    names = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    return f"{names} cannot be read as {kind} ({_line(error.__cause__ or error)})"


def _read_through(file: Path) -> None:
    with fsspec.open(str(file), "rt", compression="infer", encoding="utf-8") as stream:
        while stream.read(_READ):
            pass


def _from_hub(name: str, config: DataConfig, split: str, work_dir: Path) -> Dataset:
    try:
        rows = datasets.load_dataset(
            name,
            config.subset,
            split=split,
            revision=config.revision,
            cache_dir=str(work_dir),
            num_proc=config.num_proc,
        )
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise InputError(
            f"{name!r} is neither a file nor a folder, and cannot be loaded from the Hub "
            f"({_line(error)}): check the id, subset, split and revision, and the connection"
        ) from error
    return cast(Dataset, rows)


def _line(error: BaseException) -> str:
    text = str(error).strip()
    first = text.splitlines()[0].rstrip(".") if text else type(error).__name__
    return first if len(first) < 200 else first[:199] + "…"
