"""``report.html``: one self-contained page with the results of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_distill.data import Step
from hf_distill.errors import InputError
from hf_distill.reporting import plots
from hf_distill.reporting.comparison import benchmark_rows, nearer_sentence
from hf_distill.reporting.files import (
    history_of_set,
    read_json,
    read_preparation,
    read_recipe,
    write_page,
)
from hf_distill.reporting.formatting import (
    BY_KEY,
    ROLES,
    Figure,
    compact,
    divergence_label,
    figures_of,
    main_figures,
    measured,
    unsteady_note,
)
from hf_distill.reporting.written import written_in_training

TRAINED = ("baseline", "off_policy", "student")
# Logged under `eval_` too, but no part of the objective, or drawn in a panel of its own.
NOT_DIVERGENCES = {"loss", "ce", "teacher_ce", "top1_agreement"}


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
        "curves": _curves(run_dir, histories, list(metrics.get("sets") or {})),
        "written": written_in_training(histories),
        "scatters": _scatters(models),
        "continuations": metrics.get("continuations") or [],
        "examples": metrics.get("examples") or [],
        "unequal": unequal(recipe),
        "preparation": _preparation(run_dir, recipe),
        "recipe": recipe_text,
        "versions": flattened(metrics.get("versions") or {}),
        "machine": flattened(metrics.get("machine") or {}),
    }


# ---- Words ----


def headline(models: Mapping[str, Mapping[str, Any]], teacher: str, student: str) -> str:
    """One sentence: what was distilled into what, and how the student compares to its rival."""
    sizes = {
        role: f" ({compact(count)} parameters)"
        for role, model in models.items()
        if (count := measured(model, "parameters"))
    }
    start = (
        f"Distilling {teacher}{sizes.get('teacher', '')} into {student}{sizes.get('student', '')}"
    )
    rival = rival_of(models)
    gains = [
        (BY_KEY[key], ours, theirs)
        for key in (figure.key for figure in main_figures(models["student"]))
        if (ours := measured(models["student"], key)) is not None
        and (theirs := measured(models.get(rival), key)) is not None
    ]
    if not gains:
        return f"{start}: there is no baseline to compare with."
    parts = [_gain(*gain, RIVALS[rival]) for gain in gains]
    verdicts = [figure.prefers(ours, theirs) for figure, ours, theirs in gains]
    joint = " but " if len(set(verdicts)) > 1 else " and "
    lost = "" if any(verdicts) else "; distillation did not help here"
    return f"{start} brought {joint.join(parts)}{lost}."


# The model that a student is compared with, and the possessive for its figures.
RIVALS = {"baseline": "the baseline’s", "off_policy": "the off-policy student’s"}


def rival_of(models: Mapping[str, Any]) -> str:
    """The baseline, or without one the student of the training before this."""
    return next((role for role in RIVALS if role in models), "baseline")


def _gain(figure: Figure, ours: float, theirs: float, whose: str) -> str:
    first = figure.label.split()[0]
    # Abbreviations, such as KL and F1, and names keep their capitals.
    named = not first[1:].islower() or first in ("Pearson", "Spearman")
    what = figure.label if named else figure.label[0].lower() + figure.label[1:]
    change = f"{change} than" if (change := change_of(figure, ours, theirs)) else "the same as"
    return f"{what} to {figure.text(ours)}, {change} {whose} {figure.text(theirs)}"


def change_of(figure: Figure, ours: float, theirs: float) -> str:
    """A change in words; of percentages in points."""
    if not figure.percent:
        return change_in_words(ours, theirs)
    points = 100 * (ours - theirs)
    if abs(points) < 0.05:
        return ""
    return f"{abs(points):.1f} points {'lower' if points < 0 else 'higher'}"


def change_in_words(ours: float, theirs: float) -> str:
    """ "17% lower", or nothing where the two agree to a tenth of a percent."""
    change = (ours - theirs) / abs(theirs) if theirs else 0.0
    if abs(change) < 0.0005:
        return ""
    size = f"{100 * abs(change):.{0 if abs(change) >= 0.1 else 1}f}%"
    return f"{size} {'lower' if change < 0 else 'higher'}"


def names(recipe: Mapping[str, Any]) -> tuple[str, str]:
    """Short names of teacher and student."""
    teacher, student = (_section(recipe, role) for role in ("teacher", "student"))
    teacher_name = _model_name(teacher, "teacher")
    layers = student.get("layers")
    if isinstance(layers, dict):
        stacks = " and ".join(f"the {name}’s {_layers(kept)}" for name, kept in layers.items())
        student_name = f"a student with {stacks}"
    elif isinstance(layers, list):
        student_name = f"a student made of its {_layers(layers)}"
    elif layers is not None:
        student_name = f"a student made of {LAYERS.get(layers, f'its layers, {layers}')}"
    else:
        student_name = _model_name(student, "student")
    return teacher_name, student_name + (" with LoRA adapters" if student.get("lora") else "")


def unequal(recipe: Mapping[str, Any]) -> list[str]:
    """Sentences on further differences between the trainings of student and baseline."""
    found = []
    if annotate := _section(recipe, "annotate"):
        drawn, beams, texts = (annotate.get(key) for key in ("do_sample", "num_beams", "n"))
        how = "drawn from its distribution" if drawn else f"found with {beams or 1} beam"
        how += "s" if not drawn and (beams or 1) > 1 else ""
        how += f", {texts} for each row" if (texts or 1) > 1 else ""
        beside = " and the original ones" if annotate.get("keep_original") else ""
        found.append(
            f"The student was trained on targets that the teacher wrote ({how}){beside}; the "
            "baseline was trained on the original targets."
        )
    if _section(recipe, "data").get("unlabelled"):
        found.append(
            "The student was also trained on rows without labels, by the divergence alone; the "
            "baseline has no teacher and did not use them."
        )
    if _section(recipe, "off_policy"):
        found.append(
            "Before these steps the student was distilled on the data rows (off_policy); the "
            "baseline had no such training."
        )
    return found


COSTS = ("parameters", "decode_tokens_per_s", "examples_per_s")
LAYERS = {
    "every_other": "every other one of its layers",
    "first_and_last": "its first and last layers",
    "influence": "its most influential layers",
}


def _layers(kept: Any) -> str:
    if isinstance(kept, list):
        return f"layer{'s' if len(kept) > 1 else ''} {', '.join(map(str, kept))}"
    return LAYERS.get(kept, f"layers, {kept}").removeprefix("its ").replace("of its ", "")


def _section(recipe: Mapping[str, Any], role: str) -> Mapping[str, Any]:
    section = recipe.get(role) or {}
    return section if isinstance(section, Mapping) else {"model": str(section)}


def _model_name(section: Mapping[str, Any], role: str) -> str:
    if section.get("model"):
        return str(section["model"]).rstrip("/").rsplit("/", maxsplit=1)[-1]
    kind = (section.get("config") or {}).get("model_type")
    return f"a {kind} {role} trained from scratch" if kind else f"the {role}"


def flattened(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as (name, text) pairs, without those that are not known."""
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            pairs += flattened(value, f"{name}, ")
        elif isinstance(value, list):
            pairs.append((name, ", ".join(map(str, value))))
        elif value not in (None, ""):
            pairs.append((name, f"{value:.4g}" if isinstance(value, float) else str(value)))
    return pairs


# ---- Tables ----


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


# ---- Plots ----


def _curves(run_dir: Path, histories: Mapping[str, plots.History], sets: list[str]) -> list[str]:
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


def _scatters(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    final = {role: m for role, m in models.items() if role not in ("unadapted", "initial")}
    quality = [figure.key for figure in main_figures(models["student"], 1)]
    drawn = (plots.scatter(final, cost, key) for key in quality for cost in COSTS)
    return [svg for svg in drawn if svg]
