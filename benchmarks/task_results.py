"""The rows of benchmarks/tasks.py: a file that a run goes on with, and their table."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

# What a row is of. A row of the file with the same values of these is not measured again.
IDENTITY = ("task", "model", "seed", "settings")
TEACHER, BASELINE = "teacher", "baseline"

Row = dict[str, Any]


class Results:
    """Rows in a file of JSON lines, each written when it is found.

    path: made with its folder where it does not exist. A last line without its end, as a kill
        leaves it, is removed
    show: called with each row, measured or found in the file
    models: which to measure, by default all
    """

    def __init__(
        self,
        path: Path,
        show: Callable[[Row], None] = lambda row: None,
        models: Collection[str] = (),
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            os.truncate(path, len(whole.encode()))
        self._path, self._show, self._models = path, show, models
        self._found = {_key(row): row for row in map(json.loads, whole.splitlines())}
        self.rows: list[Row] = []

    def add(
        self, identity: Mapping[str, Any], metric: str, measured: Callable[[], dict[str, Any]]
    ) -> Row | None:
        """The row of an identity: from the file, otherwise measured and written.

        identity: the values of `IDENTITY`
        metric: the name of the row's `value` among the measured figures
        returns: None for a model that is not to be measured
        """
        if self._models and identity["model"] not in self._models:
            return None
        row = self._found.get(_key(identity))
        if row is None:
            start = time.perf_counter()
            metrics = measured()
            row = {
                **{name: identity[name] for name in IDENTITY if name != "settings"},
                "metric": metric,
                "value": metrics[metric],
                "metrics": metrics,
                "settings": identity["settings"],
                "seconds": round(time.perf_counter() - start, 1),
            }
            with self._path.open("a") as file:  # one write, so that two processes may share it
                file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        self._show(row)
        return row


def _key(row: Mapping[str, Any]) -> str:
    # Through JSON, since a tuple comes back as a list.
    return json.dumps([row[name] for name in IDENTITY], sort_keys=True)


def table(rows: Iterable[Row], metrics: Iterable[str]) -> list[Row]:
    """Means over seeds of each model, beside its teacher and its baseline.

    rows: of one task
    returns: {model, seeds, metric, mean, sd, retention, gap_closed} for each metric that the rows
        have; sd is the standard deviation over seeds, None for one seed. retention is mean /
        teacher, gap_closed is (mean - baseline) / (teacher - baseline), None where the teacher is
        not above the baseline
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["model"], []).append(row)
    found = []
    for metric in metrics:
        values = {
            model: [row["metrics"][metric] for row in group]
            for model, group in groups.items()
            if all(metric in row["metrics"] for row in group)
        }
        means = {model: statistics.fmean(numbers) for model, numbers in values.items()}
        best, base = means.get(TEACHER), means.get(BASELINE)
        for model, numbers in values.items():
            row = {"model": model, "seeds": len(numbers), "metric": metric, "mean": means[model]}
            row["sd"] = statistics.stdev(numbers) if len(numbers) > 1 else None
            if model != TEACHER and best:
                row["retention"] = means[model] / best
                if model != BASELINE and base is not None:
                    gap = best - base
                    row["gap_closed"] = (means[model] - base) / gap if gap > 0 else None
            found.append(row)
    return found
