from __future__ import annotations

import io

from rich.console import Console

from hf_distill.data import PreparationTable, Step

TABLE = PreparationTable().add(
    Step("collect", "train", 1200, 34567),
    Step(
        "clean", "train", 1100, 30000, removed={"blank": 100, "too long": 0}, changed={"mended": 3}
    ),
    Step("tokenize", "train", 1100, tokens=9000, targets=7900),
)


def test_json_round_trip() -> None:
    assert PreparationTable.from_json(TABLE.to_json()) == TABLE
    assert PreparationTable.from_json(PreparationTable().to_json()) == PreparationTable()


def test_reasons_that_met_no_row_are_left_out() -> None:
    assert TABLE.steps[1].removed == {"blank": 100}


def test_adding_leaves_the_table_as_it_was() -> None:
    longer = TABLE.add(Step("pack", "train", 10))
    assert (len(TABLE.steps), len(longer.steps)) == (3, 4)


def test_rendering_shows_every_number_and_reason() -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(TABLE.render())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for expected in ("collect", "34,567", "1,100", "9,000", "7,900", "-100 blank", "3 mended"):
        assert expected in shown
