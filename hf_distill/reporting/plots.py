"""The plots of reports, as SVG with the colours and fonts of the page around it.

Colours are CSS variables (``var(--student)``), so that one picture fits a light and a dark page and
a model has the same colour everywhere. Markers tell the models apart as well.
"""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from hf_distill.reporting.formatting import BY_KEY, compact, measured

# Placeholders that matplotlib accepts; `as_svg` replaces them by the page's variables.
INK, MUTED, RULE, PAPER = "#010101", "#020202", "#030303", "#040404"
COLOURS = {
    "teacher": "#0a0a01",
    "initial": "#0a0a02",
    "baseline": "#0a0a03",
    "off_policy": "#0a0a05",
    "student": "#0a0a04",
}
MARKERS = {"teacher": "D", "initial": "o", "baseline": "s", "off_policy": "^", "student": "o"}
# Colours of `overlaid`; with more groups they repeat.
LINES = 12
# With more groups `overlaid` leaves out the curves of training rows.
FEW = 4
LINE_COLOURS = [f"#0b0b{number:02x}" for number in range(LINES)]
_VARIABLES = (
    {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper"}
    | {colour: role for role, colour in COLOURS.items()}
    | {colour: f"line-{number}" for number, colour in enumerate(LINE_COLOURS)}
)

LOG_FROM_RATIO = 8
# Share of the steps left out of the y axis: the first fall of a loss would flatten the rest.
WARM_UP = 0.1

History = Sequence[Mapping[str, Any]]


def curves(
    histories: Mapping[str, History],
    key: str,
    title: str,
    teacher: float | None = None,
    name: str = "",
) -> str | None:
    """One quantity over the steps: training as a thin line, held-out rows as one with markers.

    histories: by role, the entries of Trainer's ``log_history``
    key: ``loss``, ``ce``, ``forward_kl``, ...; held-out values stand under ``eval_<key>``
    teacher: the teacher's own value on the held-out rows, drawn as a dashed line
    name: of the set of held-out rows, which makes the plot's ids unique in the page
    returns: SVG, or None where nothing was logged under that key
    """
    lines = {role: (series(h, key), series(h, f"eval_{key}")) for role, h in histories.items()}
    points = [point for pair in lines.values() for line in pair for point in line]
    if not points:
        return None
    figure, axes = new_axes(title)
    for role, (train, held_out) in lines.items():
        colour = COLOURS[role]
        if train:
            axes.plot(*zip(*train, strict=True), color=colour, linewidth=1.0, alpha=0.55)
        if held_out:
            style: dict[str, Any] = {
                "marker": MARKERS[role],
                "markersize": 4.5,
                "markeredgecolor": PAPER,
            }
            axes.plot(*zip(*held_out, strict=True), color=colour, linewidth=1.8, **style)
    if teacher is not None:
        axes.axhline(teacher, color=COLOURS["teacher"], linewidth=1.2, linestyle=(0, (5, 3)))
    over_steps(axes, points, () if teacher is None else (teacher,))
    if key in BY_KEY and BY_KEY[key].percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(top=min(axes.get_ylim()[1], 1.01))  # a share is at most 1
    return as_svg(figure, f"{title} over the optimizer steps", f"{key} {name}".strip())


def over_steps(
    axes: Axes, points: Sequence[tuple[float, float]], others: Sequence[float] = ()
) -> None:
    """The axes of curves over the steps; others: more values that have to be in sight."""
    last = max(step for step, _ in points)
    settled = [value for step, value in points if step >= WARM_UP * last]
    settled += others
    margin = 0.06 * (max(settled) - min(settled)) or 0.1
    axes.set(ylim=(min(settled) - margin, max(settled) + margin), xlim=(0, 1.02 * last))
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def mean_curve(histories: Sequence[History], key: str) -> list[tuple[float, float, float]]:
    """(step, mean, standard deviation) at the steps that all runs with that quantity share."""
    logged = [dict(points) for history in histories if (points := series(history, key))]
    steps = sorted(set.intersection(*map(set, logged))) if logged else []
    values = [(step, [run[step] for run in logged]) for step in steps]
    return [
        (step, statistics.fmean(each), statistics.stdev(each) if len(each) > 1 else 0.0)
        for step, each in values
    ]


def overlaid(groups: Mapping[str, Sequence[History]], key: str, title: str) -> str | None:
    """One quantity over the steps, a line for each group of runs, with its letter at the end.

    Held-out rows are lines with markers, and bands of one standard deviation where a group has
    several runs. Training rows are thin lines, drawn for few groups, or where there is no curve of
    held-out rows.

    groups: by letter, the logs of the runs; the first one has the first colour
    returns: SVG, or None where no run has logged the quantity
    """
    curves = [
        (mean_curve(histories, key), mean_curve(histories, f"eval_{key}"))
        for histories in groups.values()
    ]
    thin = len(groups) <= FEW or all(len(held_out) < 2 for _, held_out in curves)
    figure, axes = new_axes(title)
    points: list[tuple[float, float]] = []
    ends = {}
    for letter, colour, (train, held_out) in zip(groups, cycle(LINE_COLOURS), curves):
        shown = [[(step, mean) for step, mean, _ in c] for c in (train if thin else [], held_out)]
        if shown[0]:
            axes.plot(*zip(*shown[0], strict=True), color=colour, linewidth=1.0, alpha=0.55)
        if held_out:
            steps, means, spreads = map(np.array, zip(*held_out, strict=True))
            style: dict[str, Any] = {"marker": "o", "markersize": 4.5, "markeredgecolor": PAPER}
            axes.plot(steps, means, color=colour, linewidth=1.6, **style)
            if len(steps) > 1 and spreads.any():
                band = (means - spreads, means + spreads)
                axes.fill_between(steps, *band, color=colour, alpha=0.14, linewidth=0)
        if any(shown):
            ends[letter] = ((shown[1] or shown[0])[-1], colour)
        points += [*shown[0], *shown[1]]
    if not points:
        return None
    over_steps(axes, points)
    name_ends(figure, axes, ends)
    return as_svg(figure, f"{title} over the optimizer steps", f"runs-{key}")


def name_ends(
    figure: Figure, axes: Axes, ends: Mapping[str, tuple[tuple[float, float], str]], line: float = 9
) -> None:
    """The letter of each curve beside its end, within the axes, ``line`` points from the next."""
    figure.draw_without_rendering()  # fixes the layout, and with it where the points lie
    points = 72 / figure.dpi
    places = {k: axes.transData.transform(end)[1] * points for k, (end, _) in ends.items()}
    order = sorted(places, key=lambda letter: places[letter])
    heights, least = dict(places), axes.bbox.y0 * points
    for letter in order:  # upwards from the lowest, then back from the top
        heights[letter] = least = max(heights[letter], least)
        least += line
    most = axes.bbox.y1 * points
    for letter in reversed(order):
        heights[letter] = most = min(heights[letter], most)
        most -= line
    for letter, (end, colour) in ends.items():
        axes.annotate(
            letter,
            end,
            xytext=(7, heights[letter] - places[letter]),
            textcoords="offset points",
            verticalalignment="center",
            color=colour,
            fontweight="bold",
            fontsize=9,
            annotation_clip=False,
        )


def series(history: History, key: str) -> list[tuple[float, float]]:
    """(step, value) wherever a finite number was logged under that key.

    A cross-entropy of exactly 0 is that of steps without labels, such as on-policy ones.
    """
    points = [(measured(entry, "step"), measured(entry, key)) for entry in history]
    known = [(step, value) for step, value in points if step is not None and value is not None]
    return [point for point in known if key != "ce" or point[1]]


def scatter(models: Mapping[str, Mapping[str, Any]], x_key: str, y_key: str) -> str | None:
    """The models by two of their figures, each with its name beside it; None for fewer than two."""
    points = {
        role: (x, y)
        for role, model in models.items()
        if (x := measured(model, x_key)) and (y := measured(model, y_key))
    }
    if len(points) < 2:
        return None
    figure, axes = new_axes(_axis_label(y_key))
    for role, (x, y) in points.items():
        face = PAPER if role == "initial" else COLOURS[role]
        style: dict[str, Any] = {
            "s": 60,
            "facecolor": face,
            "edgecolor": COLOURS[role],
            "linewidth": 1.6,
        }
        axes.scatter(x, y, marker=MARKERS[role], zorder=3, **style)
    xs, ys = zip(*points.values(), strict=True)
    _scale(axes, "x", xs)
    _scale(axes, "y", ys)
    if BY_KEY[y_key].percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel(_axis_label(x_key))
    _name_points(figure, axes, points)
    return as_svg(figure, f"{_axis_label(y_key)} against {_axis_label(x_key)}", f"{x_key}-{y_key}")


def _axis_label(key: str) -> str:
    figure = BY_KEY[key]
    unit = f" ({figure.unit})" if figure.unit else ""
    return f"{figure.label}{unit}, {figure.better} is better"


def _scale(axes: Axes, which: str, values: Sequence[float]) -> None:
    """Logarithmic where the values differ by much, otherwise linear from zero for the x axis."""
    low, high = min(values), max(values)
    axis = axes.xaxis if which == "x" else axes.yaxis
    set_limits = axes.set_xlim if which == "x" else axes.set_ylim
    if high / low > LOG_FROM_RATIO:
        axes.set_xscale("log") if which == "x" else axes.set_yscale("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        set_limits(low / 1.6, high * 1.9)
    else:
        axis.set_major_locator(MaxNLocator(5))
        room = 0.18 * (high - low) or 0.1 * high
        set_limits(0 if which == "x" else low - room, high * 1.3 if which == "x" else high + room)
    axis.set_major_formatter(FuncFormatter(lambda value, _: compact(value, like=high)))


def _name_points(
    figure: Figure, axes: Axes, points: Mapping[str, tuple[float, float]], line: float = 13
) -> None:
    """Each point's name to its right, pushed up where names would overlap (``line`` in points)."""
    figure.draw_without_rendering()  # fixes the layout, and with it where the points lie
    at = {role: axes.transData.transform(point) * 72 / figure.dpi for role, point in points.items()}
    placed: list[tuple[float, float]] = []
    for role in sorted(at, key=lambda role: at[role][1]):
        x, y = at[role]
        height = y
        for other_x, other_height in sorted(placed, key=lambda place: place[1]):
            if abs(other_x - x) < 60 and abs(other_height - height) < line:
                height = other_height + line
        placed.append((x, height))
        axes.annotate(
            role,
            points[role],
            xytext=(9, height - y),
            textcoords="offset points",
            verticalalignment="center",
            color=COLOURS[role],
            fontweight="bold" if role == "student" else "normal",
        )


def new_axes(title: str) -> tuple[Figure, Axes]:
    """An empty plot in the style of the page."""
    figure = Figure(figsize=(5.2, 3.3), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", color=INK, size=10.5, pad=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.tick_params(length=0, colors=MUTED, labelsize=9)
    axes.xaxis.label.set(color=MUTED, size=9.5)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def as_svg(figure: Figure, description: str, name: str) -> str:
    """The figure as inline SVG: text as text, no fixed colours, the same for the same data."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    # Ids are numbered from one in every figure: in one page they would not be unique.
    prefix = re.sub(r"[^a-z0-9]", "-", name.lower())
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    size = re.search(r'viewBox="[^"]*"', svg)
    assert size is not None  # matplotlib always writes one
    label = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    opening = f'<svg role="img" aria-label="{label}" {size[0]} xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1).strip()
