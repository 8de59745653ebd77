from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.data import (
    CleanConfig,
    DataConfig,
    PreparationTable,
    check_max_length,
    clean_rows,
    require_rows,
    text_iterator,
)
from hf_distill.data.clean import _examine_row
from hf_distill.errors import InputError

OFF = {"near_duplicates": None, "eval_overlap": None, "exact_duplicates": False}


def prepare(
    folder: Path, texts: list[str], seed: int = 0, **options: Any
) -> tuple[DatasetDict, PreparationTable]:
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    config = DataConfig(train=str(folder / "rows.jsonl"), **options)
    return clean_rows(config, seed=seed, work_dir=folder / "work")


def repaired(text: str, **options: Any) -> str:
    return _examine_row({"text": text}, "text", CleanConfig(**options))["text"]


@pytest.mark.parametrize(
    ("damaged", "whole"),
    [
        ("The cafÃ© is closed.", "The café is closed."),
        ("It isnâ€™t so, he said.", "It isn’t so, he said."),
        ("a\x00b\x07\tc\nd\x0c\x1be", "ab\tc\nde"),
        ("\ufeffstart", "start"),
        ("one\r\ntwo\rthree", "one\ntwo\nthree"),
    ],
)
def test_damage_is_repaired(damaged: str, whole: str) -> None:
    assert repaired(damaged) == whole


@pytest.mark.parametrize(
    "text",
    [
        "if a &lt; b && c: print('&amp;', “quoted”)\n\n\tx = 'ﬁ ＡＢ e\u0301 \u200d'\n",
        "def f():\r\n    return 'naïve – “œuvre” 日本語 👩‍👩‍👧'\n".replace("\r", ""),
    ],
)
def test_what_is_right_stays(text: str) -> None:
    assert repaired(text) == text


def test_repairs_can_be_switched_off() -> None:
    assert repaired("cafÃ©\x07", repair_unicode=False) == "cafÃ©"
    assert repaired("cafÃ©\x07", strip_control_characters=False) == "café\x07"


@given(st.text(alphabet=st.characters(codec="ascii")))
def test_printable_ascii_is_never_changed(text: str) -> None:
    printable = "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")
    assert repaired(text.replace("\r", "")) == printable


def test_every_row_that_goes_has_a_reason(tmp_path: Path) -> None:
    good = [f"Row number {number} says something of its own: {number**5}." for number in range(40)]
    menu = "\n".join(["home", "about", "contact"] * 6)
    chant = "buy it now or never " * 30
    texts = [
        *good,
        " \n ",
        "tiny",
        "long " + "x" * 500,
        menu,
        chant,
        "cafÃ© au lait, un peu",
        "bell\x07 rings at eight",
    ]
    rows, table = prepare(
        tmp_path,
        texts,
        clean={"min_characters": 6, "max_characters": 500, **OFF},
        eval_fraction=0.1,
    )
    step = table.steps[1]
    assert step.name == "clean"
    assert step.removed == {
        "blank": 1,
        "too short": 1,
        "too long": 1 + (len(chant) > 500),
        "repeated lines": 1,
    }
    assert step.changed == {"Unicode repaired": 1, "control characters removed": 1}
    assert (
        step.rows
        == len(texts) - sum(step.removed.values())
        == len(rows["train"]) + len(rows["eval"])
    )
    _, table = prepare(tmp_path / "b", texts, clean=OFF)
    assert table.steps[1].removed["repeated n-grams"] == 1


def test_each_filter_can_be_switched_off(tmp_path: Path) -> None:
    menu = "\n".join(["home", "about", "contact"] * 6)
    texts = [menu, "buy it now or never " * 30, "row one", "row two", "x"]
    free = {"max_repeated_lines": None, "max_top_ngram": None, **OFF}
    rows, _ = prepare(tmp_path, texts, clean=free)
    assert sorted([*rows["train"]["text"], *rows["eval"]["text"]]) == sorted(texts)


def test_rows_without_anything_to_learn_go(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hello"}]
    answered = [*turns, {"role": "assistant", "content": "good day"}]
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"messages": chat}) for chat in (turns, answered, answered[::-1]))
    )
    (tmp_path / "b.jsonl").write_text(
        "\n".join(json.dumps({"prompt": "p", "completion": text}) for text in (None, " ", "a", "b"))
    )
    for file, left in (("a.jsonl", 2), ("b.jsonl", 2)):
        config = DataConfig(train=str(tmp_path / file), eval_fraction=0.5)
        rows, table = clean_rows(config, seed=0, work_dir=tmp_path / "work")
        assert table.steps[1].removed == {"nothing to learn": table.steps[0].rows - left}
        assert (len(rows["train"]), len(rows["eval"])) == (1, 1)


def test_held_out_rows_depend_on_content_and_seed_only(tmp_path: Path) -> None:
    texts = [f"row {number}" for number in range(200)]
    rows, _ = prepare(tmp_path / "a", texts, clean=OFF, eval_fraction=0.1)
    turned, _ = prepare(tmp_path / "b", texts[::-1], clean=OFF, eval_fraction=0.1)
    other, _ = prepare(tmp_path / "c", texts, seed=1, clean=OFF, eval_fraction=0.1)
    assert len(rows["eval"]) == 20
    assert set(rows["eval"]["text"]) == set(turned["eval"]["text"])
    assert set(rows["eval"]["text"]) != set(other["eval"]["text"])


@settings(max_examples=10, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 6), min_size=8, max_size=40).filter(lambda n: len(set(n)) > 1)
)
def test_equal_rows_are_held_out_together(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int]
) -> None:
    texts = [f"row {number}" for number in numbers]
    rows, _ = prepare(tmp_path_factory.mktemp("x"), texts, clean=OFF, eval_fraction=0.3)
    assert not set(rows["train"]["text"]) & set(rows["eval"]["text"])
    assert len(rows["train"]) + len(rows["eval"]) == len(texts)


def test_samples_are_deterministic_and_keep_the_order(tmp_path: Path) -> None:
    texts = [f"row {number:03d}" for number in range(100)]
    options = {"clean": OFF, "max_train_rows": 10, "max_eval_rows": 3, "eval_fraction": 0.2}
    rows, table = prepare(tmp_path, texts, **options)
    assert (len(rows["train"]), len(rows["eval"])) == (10, 3)
    assert rows["train"]["text"] == sorted(rows["train"]["text"])
    assert [step.removed for step in table.steps if step.removed] == [
        {"not sampled": 17},
        {"not sampled": 70},
    ]
    other, _ = prepare(tmp_path, texts, seed=5, **options)
    assert other["train"]["text"] != rows["train"]["text"]


def test_the_result_does_not_depend_on_processes(tmp_path: Path, real_data: Path) -> None:
    file = real_data / "small" / "instruct_p3_open_train.first200.jsonl"
    results = []
    for number, processes in enumerate((None, 2)):
        config = DataConfig(train=str(file), num_proc=processes)
        rows, table = clean_rows(config, seed=0, work_dir=tmp_path / str(number))
        results.append((rows["train"].to_list(), rows["eval"].to_list(), table))
    assert results[0] == results[1]


def test_no_rows_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no row is left after cleaning"):
        prepare(tmp_path / "a", ["  ", "\t"])
    with pytest.raises(InputError, match="the data are 2 times one row"):
        prepare(tmp_path / "b", ["same", "same"])
    (tmp_path / "train.txt").write_text("one\ntwo\n")
    (tmp_path / "eval.txt").write_text(" \n \n")
    config = DataConfig(train=str(tmp_path / "train.txt"), eval=str(tmp_path / "eval.txt"))
    with pytest.raises(InputError, match=r"no evaluation rows are left \(2 blank\)"):
        clean_rows(config, seed=0, work_dir=tmp_path / "work")


def test_evaluation_settings_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    train = str(tmp_path / "a.txt")
    with pytest.raises(InputError, match=r"data\.train is local"):
        clean_rows(DataConfig(train=train, eval_split="test"), seed=0, work_dir=tmp_path / "w")
    config = DataConfig(train=train, eval=str(tmp_path / "b.jsonl"))
    with pytest.raises(InputError, match="training rows are text but evaluation rows are prompt"):
        clean_rows(config, seed=0, work_dir=tmp_path / "w")


def test_second_call_reuses_the_files(tmp_path: Path) -> None:
    texts = [f"row {number}" for number in range(50)]
    first, table = prepare(tmp_path, texts)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*.arrow")}
    config = DataConfig(train=str(tmp_path / "rows.jsonl"))
    second, again = clean_rows(config, seed=0, work_dir=tmp_path / "work")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*.arrow")} == files
    assert second["train"].to_list() == first["train"].to_list()
    assert again == table


def test_standard_library_source_is_not_damaged(tmp_path: Path) -> None:
    config = DataConfig(train="{stdlib}/[a-d]*.py", rows="document", clean=OFF)
    rows, table = clean_rows(config, seed=0, work_dir=tmp_path)
    assert table.steps[1].removed == {}
    sources = {*rows["train"]["text"], *rows["eval"]["text"]}
    assert len(sources) == table.steps[0].rows > 20
    for source in sources:
        compile(source, "source", "exec")


def test_text_iterator(tmp_path: Path) -> None:
    rows, _ = prepare(tmp_path, ["one", "two", "three", "four"], clean=OFF)
    assert list(text_iterator(rows)) == rows["train"]["text"]
    chat = (
        rows["train"]
        .select([0])
        .map(
            lambda _: {
                "messages": [
                    {"role": "user", "content": "u"},
                    {"role": "assistant", "content": "a"},
                ]
            },
            remove_columns="text",
        )
    )
    assert list(text_iterator(chat)) == ["u", "a"]


def test_requirements(tmp_path: Path) -> None:
    rows, _ = prepare(tmp_path, ["one", "two", "three"], clean=OFF)
    require_rows(rows["train"], 2, "one batch")
    with pytest.raises(InputError, match="too small for one batch: 2 of 3 rows"):
        require_rows(rows["train"], 3, "one batch")
    check_max_length(64, 64, "the student")
    check_max_length(64, None, "the student")
    with pytest.raises(InputError, match=r"max_length is 65, but the student has 64 positions"):
        check_max_length(65, 64, "the student")
