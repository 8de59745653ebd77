"""Run a recipe over a grid of settings, one run after the other.

Each run is a process of its own, started as `hf-distill run` is. Its random numbers, engine and
library settings are those of a run alone, and its memory is free when it ends. Starting a process
costs a few seconds. Runs share the results of stages whose inputs agree (`Run.same_elsewhere`).
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from hf_distill.errors import InputError
from hf_distill.recipes.reading import load_recipe, split_values
from hf_distill.recipes.schema import Recipe
from hf_distill.reporting.compare_runs import PAGE, terminal_table, write_comparison
from hf_distill.reporting.runs import find_runs, group_runs, short_names

LONGEST_NAME = 100


@dataclass(frozen=True)
class Point:
    """One run of a sweep: the name of its run folder, and its `--set` overrides."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep and the folder that holds their run folders."""

    folder: Path
    points: tuple[Point, ...]


def plan_sweep(recipe: str | Path, overrides: Sequence[str]) -> Sweep:
    """The grid of all combinations of the values given.

    overrides: "key=value" as for `hf-distill run`, or "key=value,value,..."
    raises: InputError where no key has several values, where one of the combinations is no valid
        recipe, or where two of them are the same
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "a sweep starts one process for each run and cannot run under `accelerate launch`: use "
            "`hf-distill sweep`, or launch the runs one by one"
        )
    choices = _choices(overrides)
    several = [key for key, values in choices.items() if len(values) > 1]
    for key in ("name", "output_dir"):
        if key in several:
            raise InputError(
                f"--set {key} has several values, but it decides where a sweep stores its runs: "
                "give one value"
            )
    if not several:
        raise InputError(
            "no key has several values, so there is nothing to sweep over: separate values by "
            "commas, as in --set train.temperature=1,2,4, or use `hf-distill run`"
        )
    grid = [
        dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())
    ]
    # All of them are read before the first one runs.
    recipes = [load_recipe(recipe, [*point.values()]) for point in grid]
    folder = Path(recipes[0].output_dir) / f"{recipes[0].name}-sweep"
    names = _names([{key: _value(point[key]) for key in several} for point in grid])
    _refuse_equal(names, recipes)
    return Sweep(
        folder,
        tuple(
            Point(name, (*point.values(), f"name={name}", f"output_dir={folder}"))
            for name, point in zip(names, grid, strict=True)
        ),
    )


def run_sweep(recipe: str | Path, overrides: Sequence[str]) -> Path:
    """Run the grid, print a table of the results, and return the page that compares the runs.

    overrides: as for `plan_sweep`
    raises: InputError naming the first run that fails; the results made so far are kept
    """
    planned = plan_sweep(recipe, overrides)
    total = len(planned.points)
    print(f"sweep: {total} runs in {planned.folder}", flush=True)
    for number, point in enumerate(planned.points, 1):
        print(f"sweep: run {number} of {total}, {point.name}", flush=True)
        code = run_point(recipe, point, planned.folder)
        if code:
            how = f"with exit code {code}" if code > 0 else f"by signal {-code}"
            raise InputError(
                f"the run {point.name!r} ended {how}: results made so far are kept, and the same "
                "command continues from here"
            )
    folders = [planned.folder / point.name for point in planned.points]
    page, _ = write_comparison(folders, planned.folder / PAGE)
    table = terminal_table(group_runs(find_runs(folders)[0])[1])
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return page


def run_point(recipe: str | Path, point: Point, folder: Path) -> int:
    """Run one combination in a process of its own; returns its exit code."""
    options = [word for override in point.overrides for word in ("--set", override)]
    command = [sys.executable, "-m", "hf_distill.cli", "run", str(recipe), *options]
    return subprocess.run([*command, "--share-with", str(folder)], check=False).returncode


def _choices(overrides: Sequence[str]) -> dict[str, list[str]]:
    """By key, the overrides to choose from; of a key that is given twice, the last ones."""
    choices: dict[str, list[str]] = {}
    for override in overrides:
        key, _, text = override.partition("=")
        key, values = key.strip(), split_values(text)
        choices.pop(key, None)
        choices[key] = [f"{key}={value}" for value in values] if len(values) > 1 else [override]
    return choices


def _value(override: str) -> str:
    return override.partition("=")[2]


def _names(points: Sequence[Mapping[str, str]]) -> list[str]:
    """Names of run folders, as "temperature-2_seed-0"; long or equal ones end in a hash."""
    short = short_names(list(points[0]))
    plain = [
        "_".join(f"{_safe(short[key])}-{_safe(value)}" for key, value in point.items())
        for point in points
    ]
    return [
        name if len(name) <= LONGEST_NAME and plain.count(name) == 1 else _hashed(name, point)
        for name, point in zip(plain, points, strict=True)
    ]


def _safe(text: str) -> str:
    """Letters, digits and dots of a text, usable in the name of a folder."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.") or "none"


def _hashed(name: str, point: Mapping[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(point.items())).encode()).hexdigest()
    return f"{name[: LONGEST_NAME - 9]}-{digest[:8]}"


def _refuse_equal(names: Sequence[str], recipes: Sequence[Recipe]) -> None:
    """InputError where two combinations are the same run, which would count twice in a mean."""
    seen: dict[str, str] = {}
    for name, recipe in zip(names, recipes, strict=True):
        text = recipe.model_dump_json()
        if text in seen:
            raise InputError(
                f"the runs {seen[text]!r} and {name!r} have the same settings: give each value once"
            )
        seen[text] = name
