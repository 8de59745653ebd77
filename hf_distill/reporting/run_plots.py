"""The plots of one run: curves of its trainings, quality against size and speed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_distill.reporting import plots
from hf_distill.reporting.files import history_of_set, read_json
from hf_distill.reporting.formatting import divergence_label, main_figures

COSTS = ("parameters", "decode_tokens_per_s", "examples_per_s")
# Logged under `eval_` too, but no part of the objective, or drawn in a panel of its own.
NOT_DIVERGENCES = {"loss", "ce", "teacher_ce", "top1_agreement"}


def curves_of_run(
    run_dir: Path, histories: Mapping[str, plots.History], sets: list[str]
) -> list[str]:
    """The curves of all trainings; those of held-out rows for each set of them."""
    evaluated = any(key.startswith("eval_") for h in histories.values() for e in h for key in e)
    if not sets or not evaluated:
        return _curves_of_set(run_dir, histories)
    found: list[str] = []
    for name in sets:
        logs = {role: history_of_set(h, name, sets) for role, h in histories.items()}
        found += _curves_of_set(run_dir, logs, name)
    return found


def _curves_of_set(
    run_dir: Path, histories: Mapping[str, plots.History], of_set: str = ""
) -> list[str]:
    """of_set: its name, which stands behind the titles"""
    labels = {
        "ce": "Cross-entropy (nats per target)",
        **{name: divergence_label(name) for name in divergences(histories)},
        "loss": "Loss, each model's own objective",
        "top1_agreement": "Top-1 agreement with the teacher",
    }
    if not any(plots.series(history, "ce") for history in histories.values()):
        labels["loss"] = "Loss"
    references = {"ce": _last(histories, "eval_teacher_ce")}
    alike = {role: h for role, h in histories.items() if _same_divergence(run_dir, role)}
    drawn = (
        plots.curves(
            alike if key in divergences(histories) else histories,
            key,
            f"{label}, {of_set}" if of_set else label,
            references.get(key),
            of_set,
        )
        for key, label in labels.items()
    )
    return [svg for svg in drawn if svg]


def _same_divergence(run_dir: Path, role: str) -> bool:
    """Whether a model's divergence was logged as the student's was, and can be drawn beside it."""
    ours, theirs = (
        (read_json(run_dir / name / "training_results.json", dict) or {}).get("divergence")
        for name in ("student", role)
    )
    return ours == theirs


def _last(histories: Mapping[str, plots.History], key: str) -> float | None:
    """The last value that was logged under a key in any of the trainings."""
    values = [value for history in histories.values() for _, value in plots.series(history, key)]
    return values[-1] if values else None


def divergences(histories: Mapping[str, plots.History]) -> list[str]:
    """The names of what was logged both in training and, as ``eval_<name>``, on held-out rows."""
    keys = dict.fromkeys(key for h in histories.values() for entry in h for key in entry)
    return [key for key in keys if f"eval_{key}" in keys and key not in NOT_DIVERGENCES]


def scatters(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Quality against size and against speed."""
    final = {role: m for role, m in models.items() if role not in ("unadapted", "initial")}
    quality = [figure.key for figure in main_figures(models["student"], 1)]
    drawn = (plots.scatter(final, cost, key) for key in quality for cost in COSTS)
    return [svg for svg in drawn if svg]
