"""Find the columns of sources and targets: documents and summaries, translations, prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_distill.errors import InputError

# The names under which public data sets hold sources and their targets.
PAIRS = (
    ("document", "summary"),
    ("article", "highlights"),
    ("dialogue", "summary"),
    ("text", "summary"),
    ("source", "target"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("query", "response"),
)


@dataclass(frozen=True)
class SourceTarget:
    """The names of the source and target columns.

    source, target: names of columns; "translation.en" is the field "en" of the column "translation"
    """

    source: str
    target: str


def find_source_target(names: Sequence[str], columns: Mapping[str, str] | None) -> SourceTarget:
    """The columns of source and target.

    names: the existing columns
    columns: {"source": ..., "target": ...}, if the names are not among `PAIRS`
    raises: InputError if there is no known pair, or a named column does not exist
    """
    if columns is not None:
        unknown = set(columns) - {"source", "target"}
        if unknown or len(columns) < 2:
            raise InputError(
                f"columns has {', '.join(sorted(columns)) or 'nothing'}, but needs 'source' and "
                "'target'"
            )
        return SourceTarget(columns["source"], columns["target"])
    for source, target in PAIRS:
        if {source, target} <= set(names):
            return SourceTarget(source, target)
    if "translation" in names:
        raise InputError(
            "the column translation does not state the direction: name both languages, as in "
            'columns={"source": "translation.en", "target": "translation.es"}'
        )
    raise InputError(
        f"the columns {', '.join(names)} hold no known source and target: name them by "
        "columns={'source': ..., 'target': ...} (in a recipe data.columns)"
    )


def value_at(row: Mapping[str, Any], path: str) -> Any:
    """The value of a column, or of a field of it; InputError if there is none."""
    name, _, field = path.partition(".")
    cell = row[path] if path in row else row.get(name)
    if path in row or (name in row and not field):
        return cell
    if isinstance(cell, Mapping) and field in cell:
        return cell[field]
    held = ", ".join(cell) if isinstance(cell, Mapping) else ", ".join(row)
    raise InputError(f"there is no {path!r}, only {held}")


def with_value(row: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of the row with another value of a column, or of a field of it."""
    name, _, field = path.partition(".")
    if path in row or not field:
        return {**row, path: value}
    return {**row, name: {**(row.get(name) or {}), field: value}}


def text_at(row: Mapping[str, Any], path: str) -> str:
    """The text of a column; InputError if it is empty, or no text."""
    text = value_at(row, path)
    if not isinstance(text, str):
        raise InputError(f"{path!r} holds {type(text).__name__}, not text")
    if not text.strip():
        raise InputError(f"{path!r} is empty: leave out such rows")
    return text
