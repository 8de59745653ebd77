"""Compare the figures of several models: retention and gap closed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from hf_distill.errors import InputError
from hf_distill.reporting.formatting import (
    BY_KEY,
    ROLES,
    Figure,
    figures_of,
    measured,
    unsteady_note,
)

Results = Mapping[str, Mapping[str, float]]

RETAINED = (
    "accuracy",
    "macro_f1",
    "micro_f1",
    "entity_f1",
    "entity_precision",
    "entity_recall",
    "exact_match",
    "f1",
    "rouge1",
    "rouge2",
    "rougeL",
    "bleu",
    "chrf",
    "perplexity",
    "bits_per_byte",
    "top1_agreement",
    "written_rougeL",
    "written_agreement",
)
"""Excluded are correlations and squared errors, whose ratios mean nothing; the calibration error,
where the teacher's value is not a goal; and the KL, which is 0 for the teacher."""
OTHERS = ("pearson", "spearman", "mse", "mse_to_teacher", "kl_to_teacher", "written_reverse_kl")


def compare(results: Results) -> dict[str, dict[str, float]]:
    """The share of the teacher's quality that the student keeps, and of the gap that it closes.

    results: figures by model, with `teacher` and `student`, and perhaps `baseline`
    returns: by metric,
        `retention`: student / teacher where more is better, teacher / student where less is; 1 is
        the teacher's quality
        `gap_closed`: (baseline - student) / (baseline - teacher); 0 is the baseline's quality, 1
        the teacher's; absent where the baseline is missing or not worse than the teacher
    raises: InputError where teacher or student is missing
    """
    for name in ("teacher", "student"):
        if name not in results:
            raise InputError(
                f"the results have no {name!r}, only {', '.join(map(repr, results)) or 'nothing'}: "
                "a comparison needs the figures of both teacher and student"
            )
    teacher, student = {**results["teacher"], "kl_to_teacher": 0.0}, results["student"]
    baseline = results.get("baseline", {})
    retention, gap_closed = {}, {}
    for metric in (*RETAINED, *OTHERS):
        whole, part, start = (measured(model, metric) for model in (teacher, student, baseline))
        if whole is None or part is None:
            continue
        above, below = (part, whole) if BY_KEY[metric].better == "higher" else (whole, part)
        if metric in RETAINED and below:
            retention[metric] = above / below
        if start is not None and BY_KEY[metric].prefers(whole, start):
            gap_closed[metric] = (start - part) / (start - whole)
    return {"retention": retention, "gap_closed": gap_closed}


def nearer_sentence(sets: Mapping[str, Results]) -> str:
    """On which sets of rows the student is nearer to its teacher than the baseline is.

    sets: the figures by model of each set; nearer is the one with the lower KL to the teacher
    returns: one sentence; "" where there are no sets, or one has no such figures
    """
    nearer: list[str] = []
    others: list[str] = []
    for name, results in sets.items():
        ours, theirs = (
            measured(results.get(role), "kl_to_teacher") for role in ("student", "baseline")
        )
        if ours is None or theirs is None:
            return ""
        figure = BY_KEY["kl_to_teacher"]
        said = f"{name} (KL {figure.text(ours)}, baseline {figure.text(theirs)})"
        (nearer if figure.prefers(ours, theirs) else others).append(said)
    start = "The student is nearer to its teacher than the baseline"
    if not sets:
        return ""
    if not nearer:
        return f"{start} on none of the sets: {', '.join(others)}."
    but = f"; it is not on {', '.join(others)}" if others else ""
    return f"{start} on {', '.join(nearer)}{but}."


def by_task(
    scores: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]],
) -> dict[str, dict[str, dict[str, Mapping[str, float]]]]:
    """Scores of benchmarks by task, metric and model, of scores by model, task and metric."""
    found: dict[str, dict[str, dict[str, Mapping[str, float]]]] = {}
    for role, of_model in scores.items():
        for task, metrics in of_model.items():
            for metric, score in metrics.items():
                found.setdefault(task, {}).setdefault(metric, {})[role] = score
    return found


def benchmark_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a table of benchmarks: `task`, `metric` and the text of each model's score.

    metrics: as `metrics.json` holds them; no rows where there is no `harness` in them
    """
    rows = []
    for task, of_task in ((metrics.get("harness") or {}).get("tasks") or {}).items():
        for metric, scores in of_task.items():
            cells = {role: _score(scores[role]) for role in ROLES if role in scores}
            rows.append({"task": task, "metric": metric, "cells": cells})
    return rows


def _score(score: Mapping[str, float]) -> str:
    value, error = (measured(score, key) for key in ("value", "stderr"))
    if value is None:
        return "–"
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def benchmark_table(metrics: Mapping[str, Any]) -> Table:
    """The same as a terminal table."""
    rows = benchmark_rows(metrics)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("benchmark", "metric"):
        table.add_column(name)
    roles = list(dict.fromkeys(role for row in rows for role in row["cells"]))
    for role in roles:
        table.add_column(role, justify="right", no_wrap=True)
    for row in rows:
        cells = (row["cells"].get(role, "–") for role in roles)
        table.add_row(row["task"], row["metric"], *cells)
    return table


def results_table(
    results: Results, comparison: Mapping[str, Mapping[str, float]] | None = None
) -> Table:
    """The figures as a terminal table: a column a model, a row a figure that any of them has.

    comparison: what `compare` returned, for two more columns
    """
    # Open sides and narrow gaps leave room for four models on 80 columns.
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("")
    for model in results:
        table.add_column(model, justify="right", no_wrap=True)
    for name in comparison or {}:
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    for figure in figures_of(results):
        cells = [figure.cell(model) for model in results.values()]
        for values in (comparison or {}).values():
            share = values.get(figure.key)
            # "+ 0.0" makes 0.0 of -0.0
            cells.append("" if share is None else f"{round(100 * share, 1) + 0.0:.1f}%")
        table.add_row(_label(figure), *cells)
    table.caption = unsteady_note(results)
    table.caption_justify = "left"
    return table


def _label(figure: Figure) -> str:
    arrow = {"lower": " ↓", "higher": " ↑", None: ""}[figure.better]
    unit = f", {figure.unit}" if figure.unit in ("s", "MB", "tokens/s") else ""  # the short ones
    return f"{figure.label}{unit}{arrow}"
