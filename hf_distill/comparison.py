"""What the figures of several models say side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rich.table import Table

from hf_distill.errors import InputError

Results = Mapping[str, Mapping[str, float]]

# Calibration is left out: a teacher's is no goal that its student should come near.
MORE_IS_BETTER = {"perplexity": False, "bits_per_byte": False, "top1_agreement": True}


def compare(results: Results) -> dict[str, dict[str, float]]:
    """How much of the teacher's quality the student keeps, and of the baseline's gap it closes.

    results: figures by model, with `teacher` and `student`, and perhaps `baseline`
    returns: `retention` by metric: student / teacher where more is better, teacher / student where
        less is; 1 is the teacher's quality. `gap_closed` by metric: (baseline - student) /
        (baseline - teacher); 0 is the baseline's quality, 1 the teacher's; absent where the
        baseline is missing or not worse than the teacher. `kl_to_teacher` has a gap (the teacher's
        is 0) but no retention.
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
    for metric, more in MORE_IS_BETTER.items():
        if metric in teacher and metric in student:
            kept, whole = (student, teacher) if more else (teacher, student)
            if whole[metric]:
                retention[metric] = kept[metric] / whole[metric]
    for metric, more in {**MORE_IS_BETTER, "kl_to_teacher": False}.items():
        if metric in teacher and metric in student and metric in baseline:
            gap = baseline[metric] - teacher[metric]
            if (gap < 0) if more else (gap > 0):
                gap_closed[metric] = (baseline[metric] - student[metric]) / gap
    return {"retention": retention, "gap_closed": gap_closed}


def _decimals(value: float) -> str:
    """Four significant digits, whatever the size."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def _percent(value: float) -> str:
    return f"{round(100 * value, 1) + 0.0:.1f} %"  # "+ 0.0" makes 0.0 of -0.0


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _amount(value: float) -> str:
    """Large numbers as people say them: 2.63 M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:g}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


class Figure(NamedTuple):
    """How a figure is shown: its words, and its number in writing."""

    label: str
    write: Callable[[float], str]


FIGURES = {
    "perplexity": Figure("perplexity ↓", _decimals),
    "bits_per_byte": Figure("bits per byte ↓", _decimals),
    "kl_to_teacher": Figure("KL to teacher, nats ↓", _decimals),
    "top1_agreement": Figure("top-1 agreement ↑", _percent),
    "calibration_error": Figure("calibration error ↓", _percent),
    "parameters": Figure("parameters", _amount),
    "size_mb": Figure("size, MB", _decimals),
    "prefill_tokens_per_s": Figure("prefill, tokens/s ↑", _whole),
    "decode_tokens_per_s": Figure("decode, tokens/s ↑", _whole),
    "peak_memory_mb": Figure("peak memory, MB ↓", _decimals),
    "train_seconds": Figure("training time", _duration),
}


def results_table(
    results: Results, comparison: Mapping[str, Mapping[str, float]] | None = None
) -> Table:
    """The figures as a terminal table: a column a model, a row a figure that any of them has.

    comparison: what `compare` returned, for two more columns
    """
    table = Table(title="Evaluation on held-out rows", title_justify="left")
    table.add_column("", no_wrap=True)
    for model in results:
        table.add_column(model, justify="right")
    extra: dict[str, Any] = {
        name.replace("_", " "): values for name, values in (comparison or {}).items()
    }
    for name in extra:
        table.add_column(name, justify="right", style="dim")
    for key, figure in FIGURES.items():
        if not any(key in figures for figures in results.values()):
            continue
        cells = [_cell(figures.get(key), figure.write) for figures in results.values()]
        cells += [_cell(values.get(key), _percent, missing="") for values in extra.values()]
        table.add_row(figure.label, *cells)
    return table


def _cell(value: float | None, write: Callable[[float], str], missing: str = "–") -> str:
    return missing if value is None else write(value)
