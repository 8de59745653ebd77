"""The section of a report on the text that students generated during training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_distill.reporting import plots
from hf_distill.reporting.formatting import divergence_label

# The newest text is always shown; of a long training the others are spread over it.
MOST_SAMPLES = 6
LONGEST = 1200  # characters of a prompt and of a text

TITLES = {
    "written_tokens": "Mean length of the texts (tokens)",
    "written_cut": "Texts without an end",
    "written_repetition": "Pairs of tokens that repeat one of the same text",
    "written_distinct": "Different pairs of tokens, of all texts together",
    "written_agreement": "Top-1 agreement with the teacher on the texts",
}
LOG_PROBS = {"student": "written_log_prob", "teacher": "written_teacher_log_prob"}
SECONDS = {name: f"{name}_seconds" for name in ("writing", "judging", "learning")}
OTHERS = {"written_prompt", "written_text", *TITLES, *LOG_PROBS.values()}


def written_in_training(histories: Mapping[str, plots.History]) -> dict[str, list[Any]]:
    """Samples and curves of the texts that were written in some trainings.

    histories: by role, the entries of Trainer's ``log_history``
    returns: `samples`, dictionaries with `role`, `step`, `prompt` and `text`; `curves`, SVG; both
        empty where nothing was written
    """
    samples = [sample for role, history in histories.items() for sample in _samples(role, history)]
    wrote = {role: h for role, h in histories.items() if plots.series(h, "written_tokens")}
    if not wrote:
        return {"samples": samples, "curves": []}
    keys = dict.fromkeys(key for h in wrote.values() for entry in h for key in entry)
    titles = TITLES | {
        key: f"{divergence_label(name)}, own text"
        for key in keys
        if (name := key.removeprefix("written_")) != key and key not in OTHERS
    }
    drawn = [plots.curves(wrote, key, title) for key, title in titles.items()]
    (*_, role) = wrote  # the last training, in which the finished student has written
    colours = {"student": plots.COLOURS[role], "teacher": plots.COLOURS["teacher"]}
    title = "Log-probability of a token, by student and teacher (nats)"
    drawn.append(_lines(wrote[role], LOG_PROBS, title, colours))
    times = dict(zip(SECONDS, plots.LINE_COLOURS, strict=False))
    drawn.append(_lines(wrote[role], SECONDS, "Seconds since the entry before", times))
    return {"samples": samples, "curves": [svg for svg in drawn if svg]}


def _samples(role: str, history: plots.History) -> list[dict[str, Any]]:
    found = [entry for entry in history if "written_text" in entry]
    if len(found) > MOST_SAMPLES:
        last = len(found) - 1
        found = [found[i * last // (MOST_SAMPLES - 1)] for i in range(MOST_SAMPLES)]
    return [
        {
            "role": role,
            "step": entry.get("step"),
            # What stands last in a prompt says most of what is asked.
            "prompt": _cut(str(entry.get("written_prompt") or ""), keep_end=True),
            "text": _cut(str(entry["written_text"])),
        }
        for entry in found
    ]


def _cut(text: str, *, keep_end: bool = False) -> str:
    if len(text) <= LONGEST:
        return text
    return f"…{text[-LONGEST:]}" if keep_end else f"{text[:LONGEST]}…"


def _lines(
    history: plots.History, keys: Mapping[str, str], title: str, colours: Mapping[str, str]
) -> str | None:
    """Several quantities of one training in a plot, each with its name at the end of its line.

    keys: by the name that is shown; returns: SVG, or None where nothing was logged
    """
    lines = {name: found for name, key in keys.items() if (found := plots.series(history, key))}
    if not lines:
        return None
    figure, axes = plots.new_axes(title)
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), color=colours[name], linewidth=1.4)
    plots.over_steps(axes, [point for points in lines.values() for point in points])
    axes.set_xlim(right=1.25 * axes.get_xlim()[1])  # for the names
    plots.name_ends(figure, axes, {name: (of[-1], colours[name]) for name, of in lines.items()})
    return plots.as_svg(figure, f"{title} over the optimizer steps", "-".join(keys.values()))
