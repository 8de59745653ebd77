"""Compare several runs: the page ``compare.html`` and the table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from hf_distill.reporting import plots
from hf_distill.reporting.files import write_page
from hf_distill.reporting.formatting import (
    BY_KEY,
    Figure,
    divergence_label,
    figures_of,
    main_figures,
)
from hf_distill.reporting.run_plots import divergences
from hf_distill.reporting.runs import Group, find_runs, group_runs, shown

PAGE = "compare.html"
ROLES = ("student", "baseline", "teacher")
# With more keys than this, the table of settings has a column for each group instead of each key.
MOST_COLUMNS = 6
# Shorter names of figures in the terminal's table.
SHORT = {"kl_to_teacher": "KL", "top1_agreement": "Agreement", "f1": "F1"}
# Settings on which the scale of the logged divergence, and of the loss, depends.
SCALES = ("alpha", "temperature", "divergence", "beta", "skew")


@dataclass(frozen=True)
class Row:
    """One model in the tables of results.

    role: student, baseline or teacher
    groups: the groups that have it; several where their baselines or teachers agree
    """

    role: str
    groups: Sequence[Group]

    def text(self, figure: Figure) -> str:
        """Mean ± standard deviation of a figure."""
        return self.groups[0].text(self.role, figure)


def write_comparison(places: Sequence[str | Path], output: str | Path) -> tuple[Path, list[Path]]:
    """Write the page of the finished runs among some folders.

    places: run folders, or folders that hold run folders
    returns: the page, which appears under its name only when it is complete, and the run folders
        that were left out because they are not finished
    raises: InputError where no run is finished
    """
    runs, unfinished = find_runs(places)
    keys, groups = group_runs(runs)
    context = _context(keys, groups) | {"unfinished": [folder.name for folder in unfinished]}
    return write_page("compare.html.jinja", context, output), unfinished


def terminal_table(groups: Sequence[Group]) -> Table:
    """A row for each group, and for the baselines and teachers; the three main figures."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("")
    shown_figures = _in_terminal(groups)
    names = [SHORT.get(figure.key, figure.label) for figure in shown_figures]
    for name in ("runs", *names):
        table.add_column(name, justify="right", no_wrap=True)
    rows = list(result_rows(groups))
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        letters = " ".join(group.letter for group in row.groups)
        of = f" of {letters}" if len(row.groups) < len(groups) else ""
        name = f"{letters}  {row.groups[0].label}" if row.role == "student" else f"{row.role}{of}"
        cells = [row.text(figure) for figure in shown_figures]
        last = following is not None and following.role != row.role
        table.add_row(name, str(len(row.groups[0].runs)), *cells, end_section=last)
    return table


def _in_terminal(groups: Sequence[Group]) -> list[Figure]:
    """The main figures of the students, and their agreement with the teacher if it is measured."""
    figures = [run.models.get("student", {}) for group in groups for run in group.runs]
    every = {key: value for model in figures for key, value in model.items()}
    found = main_figures(every)
    if "top1_agreement" in every:
        found.append(BY_KEY["top1_agreement"])
    return found


def result_rows(groups: Sequence[Group]) -> Iterator[Row]:
    """The students, then the baselines and teachers, each once however many groups share it."""
    judged = [figure for figure in BY_KEY.values() if figure.judged]
    for role in ROLES:
        alike: dict[Any, list[Group]] = {}
        for group in groups:
            if any(role in run.models for run in group.runs):
                texts = tuple(group.text(role, figure) for figure in judged)
                alike.setdefault(group.letter if role == "student" else texts, []).append(group)
        yield from (Row(role, members) for members in alike.values())


def _context(keys: Sequence[str], groups: Sequence[Group]) -> dict[str, Any]:
    runs = [run for group in groups for run in group.runs]
    models = {f"{run.folder} {role}": run.models.get(role, {}) for run in runs for role in ROLES}
    figures, rows = figures_of(models), list(result_rows(groups))
    judged = [figure for figure in figures if figure.judged]
    costs = [figure for figure in figures if not figure.judged]
    return {
        "groups": groups,
        "colours": {group.letter: number % plots.LINES for number, group in enumerate(groups)},
        "runs": runs,
        "keys": keys,
        "transposed": len(keys) > MOST_COLUMNS,
        "shown": shown,
        "best": {figure.key: _best(figure, groups) for figure in judged},
        "rows": rows,
        "judged": judged,
        "costs": costs,
        "machines": len({run.machine for run in runs}),
        "other_rows": any(key.startswith(("data.", "tokenizer.")) for key in keys),
        "other_scales": any(key in keys for key in (f"train.{name}" for name in SCALES)),
        "several": any(len(group.runs) > 1 for group in groups),
        "curves": _curves(groups),
    }


def _best(figure: Figure, groups: Sequence[Group]) -> str | None:
    """The letter of the group whose students have the best mean; None where all agree."""
    means = {g.letter: mean for g in groups if (mean := g.mean("student", figure.key)) is not None}
    if len(set(means.values())) < 2:
        return None
    choose = min if figure.better == "lower" else max
    return choose(means, key=lambda letter: means[letter])


def _curves(groups: Sequence[Group]) -> list[str]:
    """The students over the steps: cross-entropy, each divergence, and the loss."""
    histories = {g.letter: [run.history for run in g.runs if run.history] for g in groups}
    found = divergences({str(run.folder): run.history for g in groups for run in g.runs})
    titles = {"ce": "Cross-entropy (nats per target)"}
    titles |= {name: divergence_label(name) for name in found}
    titles["loss"] = "Loss, each run's own objective"
    drawn = (plots.overlaid(histories, key, title) for key, title in titles.items())
    return [svg for svg in drawn if svg]
