"""Read several finished runs, find the settings that differ, and group the runs by them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_distill.errors import InputError
from hf_distill.reporting.files import history_of_set, read_json, read_recipe
from hf_distill.reporting.formatting import ROLES, Figure, measured

# Where a run is stored, which is no setting.
PLACES = ("name", "output_dir")
SEED = "seed"
# With more settings that differ, a group is called by the name of its first run.
MOST_IN_A_LABEL = 3


@dataclass(frozen=True)
class FinishedRun:
    """A run folder with metrics.

    settings: its recipe by dotted key
    models: the figures of each model
    history: the log of the student's training
    machine: where the figures were measured
    """

    folder: Path
    settings: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]]
    history: Sequence[Mapping[str, Any]]
    machine: str


@dataclass(frozen=True)
class Group:
    """Runs whose settings agree in everything but the seed.

    letter: "A" for the first group, by which tables and plots name it
    label: the settings in which it differs from other groups, as "temperature=2, alpha=0.5"
    settings: the same by dotted key
    """

    letter: str
    label: str
    settings: Mapping[str, Any]
    runs: Sequence[FinishedRun]

    def values(self, role: str, key: str) -> list[float]:
        """A figure of one model in each run that has it."""
        found = (measured(run.models.get(role), key) for run in self.runs)
        return [value for value in found if value is not None]

    def mean(self, role: str, key: str) -> float | None:
        """The mean over the runs; None where no run has the figure."""
        values = self.values(role, key)
        return statistics.fmean(values) if values else None

    def text(self, role: str, figure: Figure) -> str:
        """Mean ± standard deviation over the runs, or the one value."""
        return figure.mean_text(self.values(role, figure.key))


def find_runs(places: Iterable[str | Path]) -> tuple[list[FinishedRun], list[Path]]:
    """Read the finished runs, and list the unfinished ones.

    places: run folders, or folders that hold run folders
    raises: InputError for a place that is not a folder, or where no run is finished
    """
    folders: dict[Path, None] = {}
    for place in (places := [*map(Path, places)]):
        if not place.is_dir():
            raise InputError(f"{str(place)!r} is not a folder: give run folders, as in runs/*")
        inside = [place] if is_run(place) else sorted(p for p in place.iterdir() if is_run(p))
        folders |= dict.fromkeys(inside)
    read = {folder: _read(folder) for folder in folders}
    finished = [run for run in read.values() if run is not None]
    if not finished:
        where = ", ".join(map(str, places))
        raise InputError(
            f"none of the {len(folders)} runs in {where} is finished: let `hf-distill run` finish "
            "one first"
            if folders
            else f"there is no run folder in {where}: give folders that `hf-distill run` has made"
        )
    return finished, [folder for folder, run in read.items() if run is None]


def is_run(folder: Path) -> bool:
    """Whether `hf-distill run` has made the folder."""
    return (folder / "recipe.yaml").is_file()


def group_runs(runs: Sequence[FinishedRun]) -> tuple[list[str], list[Group]]:
    """The keys in which the runs differ, the seed aside, and the runs grouped by their values."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    differing = [
        key
        for key in keys
        if key not in (*PLACES, SEED) and len({_frozen(run.settings.get(key)) for run in runs}) > 1
    ]
    members: dict[tuple[str, ...], list[FinishedRun]] = {}
    for run in runs:
        members.setdefault(tuple(_frozen(run.settings.get(k)) for k in differing), []).append(run)
    ordered = sorted(
        members.values(), key=lambda alike: [_rank(alike[0].settings.get(k)) for k in differing]
    )
    names = short_names(differing)
    groups = []
    for number, alike in enumerate(ordered):
        settings = {key: alike[0].settings.get(key) for key in differing}
        label = ", ".join(f"{names[key]}={shown(value)}" for key, value in settings.items())
        if not label or len(settings) > MOST_IN_A_LABEL:
            label = alike[0].folder.resolve().name
        alike.sort(key=lambda run: _rank(run.settings.get(SEED)))
        groups.append(Group(_letter(number), label, settings, alike))
    return differing, groups


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
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _read(folder: Path) -> FinishedRun | None:
    """The run of a folder; None if it is not finished."""
    run = read_json(folder / "work" / "run.json", dict) or {}
    metrics = read_json(folder / "metrics.json", dict)
    history = read_json(folder / "student" / "log_history.json", list) or []
    if sets := list((metrics or {}).get("sets") or {}):
        history = history_of_set(history, sets[0], sets)  # the main one, as the figures
    # Of a run that goes on with other settings, the metrics are still those of the earlier ones.
    if metrics is None or not metrics.get("student") or run.get("complete") is False:
        return None
    return FinishedRun(
        folder,
        _flat(read_recipe(folder)[1]),
        {role: metrics[role] for role in ROLES if metrics.get(role)},
        history,
        _frozen(metrics.get("machine")),
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):  # an empty one is as good as none
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _frozen(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _rank(value: Any) -> tuple[bool, float, str]:
    """Numbers in their order, then everything else by its text."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return not is_number, value if is_number else 0.0, shown(value)


def _letter(number: int) -> str:
    """A to Z, then AA, AB, ..."""
    before = _letter(number // 26 - 1) if number >= 26 else ""
    return before + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[number % 26]
