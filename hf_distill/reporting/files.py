"""Read the files of a run folder, and write pages."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from hf_distill.data.preparation_table import PreparationTable, Step
from hf_distill.errors import InputError
from hf_distill.reporting.formatting import number

TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("hf_distill.reporting"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
TEMPLATES.filters["number"] = number


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{str(path)!r} cannot be read: {error}") from error


def read_json(path: Path, kind: type) -> Any:
    """The content of a JSON file of that type, or None if there is no such file."""
    text = _read_text(path)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{str(path)!r} is not whole ({error}): run that stage again") from error
    if not isinstance(value, kind):
        raise InputError(
            f"{str(path)!r} holds a {type(value).__name__} where a {kind.__name__} is expected: "
            "run that stage again"
        )
    return value


def read_preparation(path: Path) -> tuple[Step, ...]:
    """The steps of the data preparation; none if there is no such file."""
    text = _read_text(path)
    try:
        return PreparationTable.from_json(text).steps if text else ()
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{str(path)!r} is not a preparation's table: prepare again") from error


def read_recipe(run_dir: Path) -> tuple[str | None, dict[str, Any]]:
    """The recipe of a run folder as text and as read; None and nothing if there is none."""
    text = _read_text(run_dir / "recipe.yaml")
    try:
        recipe = yaml.safe_load(text or "")
    except yaml.YAMLError as error:
        line = str(error).splitlines()[0]
        raise InputError(f"{str(run_dir / 'recipe.yaml')!r} is not valid YAML: {line}") from error
    return text, recipe if isinstance(recipe, dict) else {}


def history_of_set(
    history: Sequence[Mapping[str, Any]], name: str, sets: Sequence[str]
) -> list[dict[str, Any]]:
    """A log with the figures of one of several sets of held-out rows as if it were the only one.

    Trainer logs those of a set under ``eval_<name>_<key>``.
    """
    # The longest name that fits: of "a" and "a_b", "eval_a_b_ce" belongs to the second.
    ordered = sorted(sets, key=len, reverse=True)

    def key_of(key: str) -> str | None:
        for one in ordered:
            if key.startswith(f"eval_{one}_"):
                return f"eval_{key.removeprefix(f'eval_{one}_')}" if one == name else None
        return key

    return [
        {new: value for key, value in entry.items() if (new := key_of(key)) is not None}
        for entry in history
    ]


def write_page(template: str, context: Mapping[str, Any], path: str | Path) -> Path:
    """Write a page, which appears under its name only when it is complete."""
    page = TEMPLATES.get_template(template).render(context)
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(page, encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be written: {error.strerror}") from error
    return path
