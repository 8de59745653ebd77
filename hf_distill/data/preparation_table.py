"""The table of a preparation: the rows that each step kept, removed and changed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from rich.table import Table


@dataclass(frozen=True)
class Step:
    """One step on one split.

    rows, characters, tokens, targets: counts after the step; None if not counted
    removed: number of removed rows, by reason
    changed: number of kept rows whose text has changed, by reason
    """

    name: str
    split: str
    rows: int
    characters: int | None = None
    tokens: int | None = None
    targets: int | None = None
    removed: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PreparationTable:
    """The steps of a preparation in their order. Immutable: ``add`` gives a longer table."""

    steps: tuple[Step, ...] = ()

    def add(self, *steps: Step) -> PreparationTable:
        """This table with further steps, without reasons that met no row."""
        return PreparationTable(self.steps + tuple(_without_zeros(step) for step in steps))

    def to_json(self) -> str:
        """JSON text: {"steps": [{"name", "split", "rows", "characters", ...}, ...]}."""
        return json.dumps({"steps": [asdict(step) for step in self.steps]}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> PreparationTable:
        """The table that ``to_json`` wrote."""
        return cls(tuple(Step(**step) for step in json.loads(text)["steps"]))

    def render(self) -> Table:
        """A ``rich`` table, for the terminal."""
        table = Table(title="Data preparation", title_justify="left")
        table.add_column("step")
        table.add_column("split")
        for name in ("rows", "characters", "tokens", "targets"):
            table.add_column(name, justify="right")
        table.add_column("rows removed, rows changed", overflow="fold")
        for previous, step in zip((None, *self.steps), self.steps, strict=False):
            if previous is not None and previous.name != step.name:
                table.add_section()
            sizes = (step.rows, step.characters, step.tokens, step.targets)
            table.add_row(step.name, step.split, *map(_number, sizes), _notes(step))
        return table


def _without_zeros(step: Step) -> Step:
    values = asdict(step)
    for name in ("removed", "changed"):
        values[name] = {reason: count for reason, count in values[name].items() if count}
    return Step(**values)


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _notes(step: Step) -> str:
    removed = [f"-{count:,} {reason}" for reason, count in step.removed.items()]
    return ", ".join(removed + [f"{count:,} {reason}" for reason, count in step.changed.items()])
