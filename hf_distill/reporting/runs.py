"""Several finished runs side by side: which settings differ, and seeds as mean and spread."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.table import Table

from hf_distill.errors import InputError
from hf_distill.reporting.formatting import BY_KEY, Figure, figures_of, measured

# Where a run is stored; no setting of it.
PLACES = ("name", "output_dir")
SEED = "seed"
SHOWN = ("perplexity", "kl_to_teacher", "top1_agreement")


@dataclass(frozen=True)
class FinishedRun:
    """A run folder with metrics.

    settings: its recipe by dotted key; models: figures by model; histories: logs by model
    """

    folder: Path
    settings: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]]
    histories: Mapping[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Group:
    """Runs whose settings agree in all but the seed.

    label: the settings in which it differs from other groups, as "temperature=2, alpha=0.5"
    """

    label: str
    settings: Mapping[str, Any]
    runs: Sequence[FinishedRun]

    def values(self, model: str, key: str) -> list[float]:
        """A figure of one model in each run that has it."""
        found = (measured(run.models.get(model), key) for run in self.runs)
        return [value for value in found if value is not None]

    def mean(self, model: str, key: str) -> float | None:
        """The mean over the seeds; None where no run has the figure."""
        values = self.values(model, key)
        return statistics.fmean(values) if values else None

    def text(self, model: str, figure: Figure) -> str:
        """Mean and standard deviation over the seeds, or the one value."""
        values = self.values(model, figure.key)
        if not values:
            return "–"
        text = figure.text(statistics.fmean(values))
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        if not spread:
            return text
        if figure.percent:
            return f"{text} ± {100 * spread:.1f}%"
        return f"{text} ± {float(f'{spread:.2g}'):,.6g}"


def find_runs(places: Iterable[str | Path]) -> tuple[list[FinishedRun], list[Path]]:
    """The finished runs among some folders and in them, and the run folders without metrics.

    raises: InputError for a place that is no folder, or where no run is finished
    """
    folders: dict[Path, None] = {}
    for place in map(Path, places):
        if not place.is_dir():
            raise InputError(f"{str(place)!r} is not a folder: give run folders, as in runs/*")
        inside = [place] if _is_run(place) else sorted(p for p in place.iterdir() if _is_run(p))
        folders |= dict.fromkeys(inside)
    finished = [folder for folder in folders if (folder / "metrics.json").is_file()]
    if not finished:
        what = f"{len(folders)} run folders, none of them finished" if folders else "no run folder"
        raise InputError(
            f"there is {what} in {', '.join(map(str, places))}: give folders that `hf-distill run` "
            "has made, and let a run finish first"
        )
    return [_read(folder) for folder in finished], [f for f in folders if f not in finished]


def group_runs(runs: Sequence[FinishedRun]) -> tuple[list[str], list[Group]]:
    """The keys in which the runs differ, the seed aside, and the runs by these."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    differing = [
        key
        for key in keys
        if key not in (*PLACES, SEED) and len({_frozen(run.settings.get(key)) for run in runs}) > 1
    ]
    short = short_names(differing)
    groups: dict[tuple[str, ...], list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(tuple(_frozen(run.settings.get(k)) for k in differing), []).append(run)
    made = []
    for members in groups.values():
        settings = {key: members[0].settings.get(key) for key in differing}
        label = ", ".join(f"{short[key]}={shown(value)}" for key, value in settings.items())
        made.append(Group(label or members[0].folder.name, settings, members))
    return differing, made


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted key, or as many parts as tell it from the others."""
    names = {}
    for key in keys:
        parts = key.split(".")
        for number in range(1, len(parts) + 1):
            name = ".".join(parts[-number:])
            if sum(other == name or other.endswith(f".{name}") for other in keys) == 1:
                break
        names[key] = name
    return names


def shown(value: Any) -> str:
    """A setting as people write it in a recipe."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def groups_table(groups: Sequence[Group]) -> Table:
    """The groups as a terminal table: students and their baselines, best means marked."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("")
    table.add_column("runs", justify="right")
    figures = [BY_KEY[key] for key in SHOWN]
    roles = [
        role for role in ("baseline", "student") if any(g.values(role, SHOWN[0]) for g in groups)
    ]
    for figure in figures:
        for role in roles:
            table.add_column(f"{figure.label}\n{role}", justify="right")
    for group in groups:
        cells = [group.text(role, figure) for figure in figures for role in roles]
        table.add_row(group.label, str(len(group.runs)), *cells)
    return table


def figures_in(groups: Sequence[Group]) -> list[Figure]:
    """The figures that any model of any run has."""
    models = [model for group in groups for run in group.runs for model in run.models.values()]
    return figures_of({str(number): model for number, model in enumerate(models)})


def _is_run(folder: Path) -> bool:
    return folder.is_dir() and (folder / "recipe.yaml").is_file()


def _read(folder: Path) -> FinishedRun:
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        line = str(error).splitlines()[0]
        raise InputError(f"run folder {str(folder)!r} cannot be read: {line}") from error
    roles = ("teacher", "initial", "baseline", "student")
    models = {role: metrics[role] for role in roles if metrics.get(role)}
    histories: dict[str, list[dict[str, Any]]] = {}
    for role in ("baseline", "student"):
        path = folder / role / "log_history.json"
        if role in models and path.is_file():
            histories[role] = json.loads(path.read_text(encoding="utf-8"))
    return FinishedRun(folder, _flat(recipe), models, histories)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _frozen(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
