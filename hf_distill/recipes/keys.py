"""The keys of a recipe by dotted path, for errors, documentation and `--set`."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hf_distill.errors import InputError
from hf_distill.recipes.schema import Recipe
from hf_distill.recipes.train_sections import RESERVED


def keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key with its field, in the order of declaration, sections before what is in them."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        section = _section(field)
        if section is not None:
            yield from keys(section, f"{prefix}{name}.")


def refuse_unknown(values: Mapping[str, Any]) -> None:
    """InputError for the first unknown key at any depth, naming the closest known one."""
    _walk(values, Recipe, "")


def refuse_unknown_path(path: str) -> None:
    """The same for one dotted path, as `--set` gives it."""
    nested: Any = None
    for part in reversed(path.split(".")):
        nested = {part: nested}
    try:
        refuse_unknown(nested)
    except InputError as error:
        if not str(error).startswith("unknown key"):
            raise
        raise _unknown(path) from None  # the whole path, not only its first wrong part


def _walk(values: Mapping[str, Any], model: type[BaseModel], prefix: str) -> None:
    for key, value in values.items():
        path = f"{prefix}{key}"
        field = model.model_fields.get(key)
        if field is None:
            if key in RESERVED and prefix.endswith(("train.", "adapt.")):
                raise InputError(f"key {path!r} cannot be set in a recipe: {RESERVED[key]}")
            raise _unknown(path)
        section = _section(field)
        if section is not None and isinstance(value, Mapping):
            _walk(value, section, f"{path}.")


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, whether or not it may be left out."""
    for hint in (field.annotation, *get_args(field.annotation)):
        if isinstance(hint, type) and issubclass(hint, BaseModel):
            return hint
    return None


def _unknown(path: str) -> InputError:
    nearest = _nearest(path)
    return InputError(f"unknown key {path!r}" + (f"; did you mean {nearest!r}?" if nearest else ""))


def _nearest(path: str) -> str | None:
    """The closest known key: a similar neighbour, the same word elsewhere, or a similar path."""
    known = [key for key, _ in keys()]
    parent, _, last = path.rpartition(".")
    neighbours = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == parent}
    if alike := difflib.get_close_matches(last, neighbours, n=1, cutoff=0.6):
        return neighbours[alike[0]]
    same_word = [key for key in known if key.rpartition(".")[2] == last]
    alike = difflib.get_close_matches(path, same_word or known, n=1, cutoff=0 if same_word else 0.6)
    return alike[0] if alike else None
