"""What a report says in words: headline, gains, names of the models, what was unequal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_distill.reporting.formatting import (
    BY_KEY,
    Figure,
    compact,
    main_figures,
    measured,
)


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
        student_name = f"a student made of {_rule(layers, student.get('num_layers'))}"
    elif _widths(student):
        student_name = "a student"
    else:
        student_name = _model_name(student, "student")
    if widths := _widths(student):
        student_name += f" with {widths}"
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
    train = _section(recipe, "train")
    if train.get("on_policy") or train.get("on_policy_raise"):
        found.append(
            "In a share of its rows the student generated the text itself and learnt the teacher's "
            "distributions on it; the baseline was trained on data rows only."
        )
    if _section(recipe, "off_policy"):
        found.append(
            "Before these steps the student was distilled on the data rows (off_policy); the "
            "baseline had no such training."
        )
    return found


LAYERS = {
    "every_other": "every other one of its layers",
    "first_and_last": "its first and last layers",
    "influence": "its most influential layers",
}


WIDTHS = {"ffn": "neurons in each layer", "heads": "attention heads", "hidden": "hidden units"}


def _rule(rule: str, number: Any) -> str:
    """The layers that a rule keeps."""
    if rule == "influence" and number:
        return f"its {number} most influential layers"
    return LAYERS.get(rule, f"its layers, {rule}")


def _widths(student: Mapping[str, Any]) -> str:
    """The narrower parts of a student: numbers, or shares of the teacher's."""
    parts = [
        f"{size:.0%} of the {name}" if isinstance(size, float) else f"{size:,} {name}"
        for key, name in WIDTHS.items()
        if (size := student.get(key)) is not None
    ]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


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
