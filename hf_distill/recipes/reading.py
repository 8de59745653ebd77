"""Read a YAML file and `--set` overrides into a `Recipe`, or into a one-line error."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hf_distill.errors import InputError
from hf_distill.recipes.keys import keys, refuse_unknown, refuse_unknown_path
from hf_distill.recipes.schema import Recipe


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, with duplicate keys refused and 1e-4 read as the number it is."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    result: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            where = key_node.start_mark.line + 1
            raise InputError(f"line {where}: key {key!r} is a {type(key).__name__}, not a word")
        if key in result:
            raise InputError(
                f"line {key_node.start_mark.line + 1}: key {key!r} is given twice: keep one of them"
            )
        result[key] = loader.construct_object(value_node, deep=True)
    return result


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
# PyYAML reads YAML 1.1, where 1e-4 is text. YAML 1.2 reads it as the number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file.

    overrides: "a.b.c=value", the value read as YAML; later ones win
    raises: InputError, naming file and key, for whatever is wrong first
    """
    path = Path(path)
    values = _read(path)
    values.setdefault("name", path.stem)
    _replace_source(values, overrides)
    for override in overrides:
        _apply(values, override)
    try:
        return _validated(values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def split_values(text: str) -> list[str]:
    """The values of "1,2,4": the parts between commas outside brackets, braces and quotes."""
    parts, depth, quote, start = [], 0, "", 0
    for place, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [part.strip() for part in (*parts, text[start:])]


def parse_recipe(text: str) -> Recipe:
    """The recipe of a YAML text that has a name, such as the `recipe.yaml` of a run folder."""
    return _validated(_parse(text))


def dump_recipe(recipe: Recipe) -> str:
    """The recipe with all its defaults as YAML; the inverse of `parse_recipe`."""
    return yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True, width=100)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not a UTF-8 text file, so not a recipe ({error.reason})"
        ) from None
    except OSError as error:
        raise InputError(f"recipe {str(path)!r} cannot be read: {error.strerror}") from None
    try:
        return _parse(text)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _parse(text: str) -> dict[str, Any]:
    values = _yaml(text)
    if not isinstance(values, dict):
        raise InputError(f"a recipe is a mapping of keys to values, but this is {_kind(values)}")
    return values


def _yaml(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader underneath
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        hint = "; a value that begins with a brace has to be quoted" if text[:1] == "{" else ""
        problem = error.problem or error.context
        raise InputError(f"{where}not valid YAML, {problem}{hint}") from None
    except yaml.YAMLError as error:
        raise InputError(f"not valid YAML, {str(error).splitlines()[0]}") from None


def _kind(value: Any) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"


# What describes the Hub data set that `data.train` names.
_OF_THE_SOURCE = ("subset", "split", "eval_split", "revision")


def _replace_source(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """A `data.train` override drops the keys that describe the recipe's own Hub data set."""
    if isinstance(values.get("data"), dict) and any(
        override.partition("=")[0].strip() == "data.train" for override in overrides
    ):
        values["data"] = {k: v for k, v in values["data"].items() if k not in _OF_THE_SOURCE}


def _apply(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    path = path.strip()
    if not equals or not path:
        raise InputError(f"--set {override!r} is not of the form key=value, as in train.alpha=0.5")
    refuse_unknown_path(path)
    try:
        value = _yaml(text)
    except InputError as error:
        raise InputError(f"--set {path}: {error}") from None
    if isinstance(value, str) and len(split_values(text)) > 1:
        raise InputError(
            f"--set {path} has several values, {text.strip()}: a run takes one; "
            "`hf-distill sweep` runs each of them. A list is written [a, b], and a text that "
            "contains commas is quoted"
        )
    *parents, last = path.split(".")
    for name in parents:
        # A string stands for {model: string}; a key below it opens the section it stands for. Sets
        # of rows replace files without a name.
        inner = values.get(name)
        section = {} if name in ("train", "eval") else {"model": inner}
        inner = dict(inner or {}) if not isinstance(inner, str | list) else section
        values[name] = inner
        values = inner
    values[last] = value


def _validated(values: dict[str, Any]) -> Recipe:
    refuse_unknown(values)
    try:
        # Strict, so that "0.5" is no number. The JSON form of strictness still takes a list of
        # numbers where a tuple is declared, which the Python form would not.
        return Recipe.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        raise InputError(_first(error, values)) from None


def _first(error: ValidationError, values: dict[str, Any]) -> str:
    """One line for the first of pydantic's errors; all the ways in which one value does not fit."""
    first = error.errors()[0]
    if first["type"] == "missing":
        *parents, name = first["loc"]
        return f"key {'.'.join([*_locate(parents, values)[0], str(name)])!r} is missing"
    path, value = _locate(first["loc"], values)
    reasons = [e for e in error.errors() if _locate(e["loc"], values)[0] == path]
    texts = dict.fromkeys(_reason(reason) for reason in reasons)
    if reasons[0]["type"] == "value_error":  # our own sentences about a whole section
        return f"{'.'.join(path) or 'the recipe'} {next(iter(texts))}"
    if reasons[0]["type"] == "model_type":  # a whole section
        inside = next(key for key, _ in keys() if key.startswith(f"{'.'.join(path)}."))
        texts = {f"a section with keys of its own, as {inside}": None}
    return f"{'.'.join(path) or 'the recipe'} is {value!r}, but must be {' or '.join(texts)}"


def _locate(loc: Sequence[int | str], values: Any) -> tuple[tuple[str, ...], Any]:
    """The part of an error's location that the file has (pydantic adds the names of types)."""
    path: list[str] = []
    for part in loc:
        known = isinstance(values, dict) and part in values
        if not known and not (isinstance(values, list) and isinstance(part, int)):
            break
        values = values[part]
        path.append(str(part))
    return tuple(path), values


def _reason(error: Any) -> str:
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    text = re.sub(r"^(Input|String|Value|List|Dictionary) should (be|have) ", "", error["msg"])
    return text if text != error["msg"] else text[0].lower() + text[1:]
