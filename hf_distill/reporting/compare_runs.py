"""``compare.html``: one self-contained page that puts several runs side by side."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_distill.reporting import plots
from hf_distill.reporting.formatting import Figure
from hf_distill.reporting.report import TEMPLATES, divergence_label, divergences
from hf_distill.reporting.runs import (
    FinishedRun,
    Group,
    figures_in,
    find_runs,
    group_runs,
    short_names,
    shown,
)

ROLES = ("student", "baseline", "teacher")
COST = ("parameters", "size_mb", "prefill_tokens_per_s", "decode_tokens_per_s", "peak_memory_mb")


def write_comparison(places: Sequence[str | Path], output: str | Path) -> tuple[Path, list[Path]]:
    """Write the page of the finished runs among some folders.

    places: run folders, or folders of them
    returns: the page, which appears under its name only when it is whole, and the run folders that
        were left out because they are not finished
    raises: InputError where no run is finished
    """
    runs, unfinished = find_runs(places)
    keys, groups = group_runs(runs)
    page = TEMPLATES.get_template("compare.html.jinja").render(_context(keys, groups, unfinished))
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.unfinished")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path, unfinished


def _context(
    keys: Sequence[str], groups: Sequence[Group], unfinished: Iterable[Path]
) -> dict[str, Any]:
    runs = [run for group in groups for run in group.runs]
    names = short_names(keys)
    figures = figures_in(groups)
    return {
        "groups": groups,
        "colours": {group.label: number % plots.LINES for number, group in enumerate(groups)},
        "number_of_runs": len(runs),
        "keys": [(key, names[key]) for key in keys],
        "settings": [[shown(group.settings[key]) for key in keys] for group in groups],
        "seeds": [", ".join(_seeds(group.runs)) for group in groups],
        "tables": [_table(role, groups, figures) for role in ROLES if _measured(role, groups)],
        "curves": _curves(groups),
        "unfinished": [folder.name for folder in unfinished],
    }


def _seeds(runs: Sequence[FinishedRun]) -> list[str]:
    return [shown(run.settings.get("seed")) for run in runs]


def _measured(role: str, groups: Sequence[Group]) -> bool:
    return any(role in run.models for group in groups for run in group.runs)


def _table(role: str, groups: Sequence[Group], figures: Sequence[Figure]) -> dict[str, Any]:
    """A row for each figure, a column for each group; the best mean marked where it matters."""
    rows = []
    for figure in figures:
        means = {group.label: group.mean(role, figure.key) for group in groups}
        known = {label: mean for label, mean in means.items() if mean is not None}
        if not known or (role != "student" and figure.key in COST):
            continue
        best = None
        if figure.judged and role == "student" and len(set(known.values())) > 1:
            choose = min if figure.better == "lower" else max
            best = choose(known, key=lambda label: known[label])
        rows.append(
            {
                "figure": figure,
                "cells": [(group.text(role, figure), group.label == best) for group in groups],
            }
        )
    return {"role": role, "rows": rows}


def _curves(groups: Sequence[Group]) -> list[str]:
    """The students over the steps, one line a run, coloured by group."""
    histories: dict[str, Mapping[str, Any]] = {
        str(run.folder): {"student": run.histories["student"]}
        for group in groups
        for run in group.runs
        if "student" in run.histories
    }
    found = dict.fromkeys(
        name for history in histories.values() for name in divergences(dict(history))
    )
    titles = {"ce": "Cross-entropy (nats per target)"}
    titles |= {name: divergence_label(name) for name in found}
    titles["loss"] = "Training objective, each its own"
    drawn = []
    for key, title in titles.items():
        runs = [
            (number % plots.LINES, run.histories["student"])
            for number, group in enumerate(groups)
            for run in group.runs
            if "student" in run.histories
        ]
        drawn.append(plots.overlaid(runs, key, title))
    return [svg for svg in drawn if svg]
