"""``report.html``: one self-contained page with the results of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_distill.data import Step
from hf_distill.errors import InputError
from hf_distill.reporting.comparison import benchmark_rows, nearer_sentence
from hf_distill.reporting.files import (
    read_json,
    read_preparation,
    read_recipe,
    write_page,
)
from hf_distill.reporting.formatting import (
    BY_KEY,
    ROLES,
    Figure,
    figures_of,
    main_figures,
    measured,
    unsteady_note,
)
from hf_distill.reporting.run_plots import COSTS, curves_of_run, scatters
from hf_distill.reporting.words import (
    RIVALS,
    change_of,
    flattened,
    headline,
    names,
    rival_of,
    unequal,
)
from hf_distill.reporting.written import written_in_training

TRAINED = ("baseline", "off_policy", "student")


def write_report(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a run folder from the files in it.

    run_dir: the folder with ``metrics.json``; ``recipe.yaml``, ``data/preparation.json`` and
        ``<model>/log_history.json`` have their sections if they are there
    output: where it goes, by default ``report.html`` in the run folder
    returns: the report's path; it appears under that name only when it is complete
    raises: InputError if there is nothing to report yet, or a file cannot be read
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise InputError(
            f"{str(run_dir)!r} is not a folder: give the folder of a run, as in runs/quickstart"
        )
    metrics = read_json(run_dir / "metrics.json", dict)
    if metrics is None:
        raise InputError(
            f"{str(run_dir)!r} has no metrics.json, so there is nothing to report yet: "
            "let the run finish its evaluation first (hf-distill run)"
        )
    models = {role: metrics[role] for role in ROLES if metrics.get(role)}
    if "student" not in models:
        raise InputError(
            f"{str(run_dir / 'metrics.json')!r} has no figures of a student: "
            "delete the file and run the evaluation again"
        )
    context = _context(run_dir, metrics, models)
    return write_page("report.html.jinja", context, output or run_dir / "report.html")


def _context(run_dir: Path, metrics: dict[str, Any], models: dict[str, Any]) -> dict[str, Any]:
    recipe_text, recipe = read_recipe(run_dir)
    teacher, student = names(recipe)
    histories = {
        role: history
        for role in TRAINED
        if role in models  # files of an earlier recipe are left out
        and (history := read_json(run_dir / role / "log_history.json", list))
    }
    return {
        "name": str(recipe.get("name") or run_dir.resolve().name),
        "headline": headline(models, teacher, student),
        "seed": metrics.get("seed"),
        "models": models,
        "tiles": list(_tiles(models)),
        "tables": _tables(metrics, models),
        "benchmarks": benchmark_rows(metrics),
        "unsteady": unsteady_note(models),
        "nearer": nearer_sentence(metrics.get("sets") or {}),
        "curves": curves_of_run(run_dir, histories, list(metrics.get("sets") or {})),
        "written": written_in_training(histories),
        "scatters": scatters(models),
        "continuations": metrics.get("continuations") or [],
        "examples": metrics.get("examples") or [],
        "unequal": unequal(recipe),
        "preparation": _preparation(run_dir, recipe),
        "recipe": recipe_text,
        "versions": flattened(metrics.get("versions") or {}),
        "machine": flattened(metrics.get("machine") or {}),
    }


def _preparation(run_dir: Path, recipe: Mapping[str, Any]) -> list[Step]:
    """The steps of the rows, then those of the targets that the teacher wrote."""
    parts = ["data", *(["annotation"] if recipe.get("annotate") else [])]
    return [s for part in parts for s in read_preparation(run_dir / part / "preparation.json")]


def _tables(metrics: Mapping[str, Any], models: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of results; of several sets of rows one for each, the costs in the first."""
    sets = metrics.get("sets") or {}
    first = {"name": next(iter(sets), ""), "rows": _rows(models, metrics.get("comparison") or {})}
    tables = [first]
    for name, of_set in list(sets.items())[1:]:
        quality = {role: of_set.get(role) or {} for role in models}
        rows = _rows(quality, of_set.get("comparison") or {})
        tables.append({"name": name, "rows": rows})
    return [{**table, "rows": list(table["rows"])} for table in tables]


def _rows(
    models: Mapping[str, Mapping[str, Any]], comparison: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """One row of the results table for each figure that was measured of any model."""
    for figure in figures_of(models):
        values = {role: measured(model, figure.key) for role, model in models.items()}
        yield {
            "figure": figure,
            "cells": {role: figure.cell(model) for role, model in models.items()},
            "best": _best(figure, values),
            "retention": _share(comparison, "retention", figure.key),
            "gap_closed": _share(comparison, "gap_closed", figure.key),
        }


def _best(figure: Figure, values: Mapping[str, float | None]) -> str | None:
    """Which of baseline and student is better, if both were measured and it matters."""
    baseline, student = values.get("baseline"), values.get("student")
    if not figure.judged or baseline is None or student is None or baseline == student:
        return None
    return "student" if figure.prefers(student, baseline) else "baseline"


def _share(comparison: Mapping[str, Any], name: str, key: str) -> str:
    shares = comparison.get(name) or {}
    value = measured(shares.get("student", shares), key)
    # "+ 0.0" makes 0.0 of -0.0
    return "–" if value is None else f"{round(100 * value, 1) + 0.0:.1f}%"


def _tiles(models: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    """The main figures, each beside that of the rival, and costs beside the teacher's."""
    tiles = [(figure.key, rival_of(models)) for figure in main_figures(models["student"])]
    for key, rival in (*tiles, *((cost, "teacher") for cost in COSTS)):
        figure = BY_KEY[key]
        ours, theirs = measured(models["student"], key), measured(models.get(rival), key)
        if ours is None:
            continue
        note, kind = "", ""
        if theirs and rival == "teacher":
            ratio = ours / theirs
            share = f"{ratio:.1f}×" if ratio >= 1.05 else f"{100 * ratio:.0f}% of"
            note = f"{share} the teacher’s {figure.text(theirs)}"
        elif theirs:
            change = change_of(figure, ours, theirs)
            note = f"{change} than" if change else "the same as"
            note = f"{note} {RIVALS[rival]} {figure.text(theirs)}"
            kind = ("good" if figure.prefers(ours, theirs) else "bad") if change else ""
        yield {
            "label": figure.label,
            "value": figure.text(ours),
            "unit": figure.unit,
            "note": note,
            "kind": kind,
        }
