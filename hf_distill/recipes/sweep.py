"""Run a recipe over a grid of settings, one run after the other.

Each run is a process of its own, started as `hf-distill run` is: it behaves as it would alone, and
gives all of its memory back. Runs share the results of stages whose inputs agree.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_distill.errors import InputError
from hf_distill.recipes.reading import load_recipe
from hf_distill.reporting.runs import short_names

PAGE = "compare.html"


@dataclass(frozen=True)
class Point:
    """One run of a sweep: its name, and `--set` overrides."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep and the folder that holds their run folders."""

    folder: Path
    points: tuple[Point, ...]


def split_values(text: str) -> list[str]:
    """The values of "1,2,4": parts between commas outside brackets, braces and quotes."""
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


def plan_sweep(recipe: str | Path, overrides: Sequence[str]) -> Sweep:
    """The grid of all combinations of the values given.

    overrides: "key=value" as for `hf-distill run`, or "key=value,value,..."
    raises: InputError for a recipe that one of the combinations does not make sense of, or where no
        key has several values
    """
    pairs = [override.partition("=") for override in overrides]
    given = {key.strip(): split_values(value) for key, _, value in pairs if key.strip()}
    several = {key: values for key, values in given.items() if len(values) > 1}
    if not several:
        raise InputError(
            "no key has several values, so there is nothing to sweep over: give them between "
            "commas, as in --set train.temperature=1,2,4, or use `hf-distill run`"
        )
    for key, values in several.items():
        if len(set(values)) < len(values):
            raise InputError(f"--set {key} has a value twice: {','.join(values)}")
    keys = [key.strip() for key, _, _ in pairs]
    single = [o for key, o in zip(keys, overrides, strict=True) if key not in several]
    base = load_recipe(recipe, single)
    folder = Path(base.output_dir) / f"{base.name}-sweep"
    names, points = short_names(list(several)), []
    for combination in itertools.product(*several.values()):
        chosen = dict(zip(several, combination, strict=True))
        name = "_".join(f"{_safe(names[key])}-{_safe(value)}" for key, value in chosen.items())
        own = [f"{key}={value}" for key, value in chosen.items()]
        place = [f"name={name}", f"output_dir={folder}"]
        points.append(Point(name, (*single, *own, *place)))
        load_recipe(recipe, points[-1].overrides)  # all of them, before the first one runs
    if len({point.name for point in points}) < len(points):
        raise InputError("two combinations have one name: give values that differ in their letters")
    return Sweep(folder, tuple(points))


def run_point(recipe: str | Path, point: Point, folder: Path) -> int:
    """Run one combination in a process of its own; returns its exit code."""
    options = [word for override in point.overrides for word in ("--set", override)]
    command = [sys.executable, "-m", "hf_distill.cli", "run", str(recipe), *options]
    return subprocess.run([*command, "--share-with", str(folder)], check=False).returncode


def _safe(text: str) -> str:
    """Letters, digits and dots of a text, usable in the name of a folder."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.") or "none"
