"""Compare the figures of several models: retention and gap closed."""

from __future__ import annotations

from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.table import Table

from hf_distill.errors import InputError
from hf_distill.reporting.formatting import BY_KEY, Figure, figures_of, measured, unsteady_note

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
)
"""Not correlations, whose zero is no zero of quality, and squared errors, which depend on a unit;
not calibration, since a teacher's is no goal for its student; nor the KL, the teacher's is 0."""
OTHERS = ("pearson", "spearman", "mse", "mse_to_teacher", "kl_to_teacher")


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
    returns: one sentence; "" where a set has no such figures
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
    if not nearer:
        return f"{start} on none of the sets: {', '.join(others)}."
    but = f"; it is not on {', '.join(others)}" if others else ""
    return f"{start} on {', '.join(nearer)}{but}."


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
