"""Several evaluation sets by name: preparation, training, evaluation, report and card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk
from run_setup import QUALITY, metrics, quality, run, write_recipe
from test_task_recipes import rows_of, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_distill import evaluate_student
from hf_distill.data import CleanConfig, DataConfig, clean_rows, read_task_rows, tokenize_rows
from hf_distill.errors import InputError
from hf_distill.losses.targets import IGNORE
from hf_distill.models.from_scratch import train_tokenizer
from hf_distill.recipes import load_recipe

SETS = ("stories", "news")
OPTIONS = ("record={k: 8, shard_rows: 20}", "evaluate.batch_size=2", "train.bf16=false")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe, its last files in two sets."""
    path = write_recipe(tmp_path_factory.mktemp("sets"))
    text = path.with_name("text")
    files = sorted(text.iterdir())[-6:]
    for number, name in enumerate(SETS):
        (path.parent / name).mkdir()
        for file in files[3 * number : 3 * number + 3]:
            file.rename(path.parent / name / file.name)
        # A training row that is in this set.
        leaked = path.parent / name / files[3 * number].name
        (text / f"leaked{number}.txt").write_text(leaked.read_text())
    places = ", ".join(f"{name}: {path.parent / name}" for name in SETS)
    path.write_text(path.read_text().replace("eval_fraction: 0.2", f"eval: {{{places}}}"))
    return path


@pytest.fixture(scope="module")
def finished(recipe: Path) -> Path:
    done = run(recipe, *OPTIONS)
    assert done.exit_code == 0, done.output
    return recipe.parent / "runs" / "tiny"


def test_no_training_row_is_in_any_set(finished: Path) -> None:
    steps = json.loads((finished / "data" / "preparation.json").read_text())["steps"]
    removed = {step["name"]: step["removed"] for step in steps if "overlap" in step["name"]}
    assert {name: found["equal to an evaluation row"] for name, found in removed.items()} == {
        f"evaluation overlap with {name}": 1 for name in SETS
    }


def test_each_set_has_its_figures(recipe: Path, finished: Path) -> None:
    found = metrics(finished)
    assert list(found["sets"]) == list(SETS)
    for name in SETS:
        of_set = found["sets"][name]
        assert of_set["teacher"]["kl_to_teacher"] == 0
        assert {"retention", "gap_closed"} <= of_set["comparison"].keys()
        assert len({of_set[role]["perplexity"] for role in ("initial", "baseline", "student")}) == 3
        assert "parameters" not in of_set["student"]
    first, second = (found["sets"][name] for name in SETS)
    assert first["student"]["perplexity"] != second["student"]["perplexity"]
    # The first set is the main one.
    assert {key: found["student"][key] for key in QUALITY} == {
        key: first["student"][key] for key in QUALITY
    }
    assert found["student"]["parameters"] > 0
    assert found["comparison"] == first["comparison"]
    assert [row["set"] for row in found["continuations"]] == ["stories"] * 2 + ["news"] * 2


def test_one_by_one_they_give_the_same(finished: Path) -> None:
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(finished / role) for role in ("student", "teacher")
    )
    tokenizer = AutoTokenizer.from_pretrained(finished / "student")
    for name in SETS:
        rows = load_from_disk(str(finished / "data" / "eval" / name))
        alone = evaluate_student(student, teacher, rows, tokenizer, speed=False)
        of_set = metrics(finished)["sets"][name]["student"]
        assert {key: alone[key] for key in QUALITY} == pytest.approx(
            {key: of_set[key] for key in QUALITY}, rel=1e-5
        )


def test_trainings_log_both_sets_and_report_and_card_show_them(finished: Path) -> None:
    log = json.loads((finished / "student" / "log_history.json").read_text())
    for name in SETS:
        assert sum(f"eval_{name}_forward_kl" in entry for entry in log) == 4
    report = (finished / "report.html").read_text()
    card = (finished / "student" / "README.md").read_text()
    for name in SETS:
        assert f"<h3>{name}</h3>" in report
        assert f"Cross-entropy (nats per target), {name}" in report
        assert f"### {name}" in card
    sentence = "nearer to its teacher than the baseline on "
    assert sentence in report
    assert sentence in card


def test_interruptions_do_not_matter(recipe: Path, finished: Path) -> None:
    before = quality(finished)
    (finished / "metrics.json").unlink()
    done = run(recipe, *OPTIONS)
    assert "record: unchanged, skipped" in done.output
    assert quality(finished) == before


def test_names_and_overrides(recipe: Path) -> None:
    with pytest.raises(InputError, match=r"data\.eval"):
        load_recipe(recipe, ["data.eval={'a/b': x.txt}"])
    with pytest.raises(InputError, match=r"data\.eval"):
        load_recipe(recipe, ["data.eval={}"])
    more = load_recipe(recipe, ["data.eval.third=x.txt"]).data.eval_splits
    assert more == ("eval/stories", "eval/news", "eval/third")
    named = load_recipe(recipe, ["data.eval=x.txt", "data.eval.one=y.txt"])
    assert named.data.eval_places == {"eval/one": ["y.txt"]}


def test_sets_may_have_other_formats_than_the_training_rows(tmp_path: Path) -> None:
    text = write(tmp_path / "text.jsonl", [{"text": f"row {n} of text"} for n in range(9)])
    question = {"role": "user", "content": "a"}
    chats = [[question, {"role": "assistant", "content": answer}] for answer in "bc"]
    chat = write(tmp_path / "chat.jsonl", [{"messages": messages} for messages in chats])
    leaked = write(tmp_path / "leaked.jsonl", [{"text": "row 3 of text"}])
    config = DataConfig(train=str(text), eval={"chat": str(chat), "leaked": str(leaked)})
    rows, _ = clean_rows(config, seed=0, work_dir=tmp_path / "work")
    assert rows["eval/chat"].column_names == ["messages"]
    assert rows["train"].column_names == ["text"]
    assert "row 3 of text" not in rows["train"]["text"]
    with pytest.raises(InputError, match="training rows are text but evaluation rows are chat"):
        clean_rows(DataConfig(train=str(text), eval=str(chat)), seed=0, work_dir=tmp_path / "work")


def test_rows_of_other_tasks(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = rows_of("classification")
    config = DataConfig(
        train=str(write(tmp_path / "train.jsonl", rows)),
        eval={
            "first": str(write(tmp_path / "first.jsonl", rows[:4])),
            "second": str(write(tmp_path / "second.jsonl", rows[10:13])),
        },
    )
    found = read_task_rows(config, "sequence-classification", seed=0, work_dir=tmp_path / "work")
    assert {split: len(of_split) for split, of_split in found.rows.items()} == {
        "train": 33, "eval/first": 4, "eval/second": 3,
    }  # fmt: skip


def test_training_sets_of_text_and_chats_become_one_split(tmp_path: Path) -> None:
    lines = [f"row {n} of text" for n in range(9)]
    text = write(tmp_path / "text.jsonl", [{"text": line} for line in lines])
    question = {"role": "user", "content": "say it"}
    chats = [[question, {"role": "assistant", "content": f"it is {n}"}] for n in range(9)]
    chat = write(tmp_path / "chat.jsonl", [{"messages": messages} for messages in chats])
    held_out = [{"text": lines[3]}, {"text": "say it\nit is 4"}]
    evaluation = write(tmp_path / "eval.jsonl", held_out)
    config = DataConfig(
        train={"text": str(text), "chat": str(chat)},
        eval={"held-out": str(evaluation)},
        max_train_rows=6,
        max_length=24,
        clean=CleanConfig(near_duplicates=None),
    )
    rows, table = clean_rows(config, seed=0, work_dir=tmp_path / "work")
    assert {split: len(part) for split, part in rows.items()} == {
        "train/text": 6, "train/chat": 6, "eval/held-out": 2,
    }  # fmt: skip
    assert lines[3] not in rows["train/text"]["text"]
    assert chats[4] not in rows["train/chat"]["messages"]
    tokenizer = train_tokenizer([*lines, *(f"it is {n} say" for n in range(9))], 270)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokens, _ = tokenize_rows(rows, tokenizer, config, table)
    assert list(tokens) == ["train", "eval/held-out"]
    train = tokens["train"]
    assert set(train.column_names) == {"input_ids", "labels", "position_ids"}
    spelt = [tokenizer.decode(ids) for ids in train["input_ids"]]
    learnt = "".join(
        tokenizer.decode([label for label in labels if label != IGNORE])
        for labels in train["labels"]
    )
    for line in rows["train/text"]["text"]:
        assert line.removeprefix("row") in learnt  # the first token of a document is not
    for messages in rows["train/chat"]["messages"]:
        assert messages[1]["content"] in learnt
    assert any("user: say it" in text for text in spelt)
    assert "say it" not in learnt
    alone = config.model_copy(update={"eval": None})
    with pytest.raises(InputError, match="several sets, from which no evaluation rows are held"):
        clean_rows(alone, seed=0, work_dir=tmp_path / "work")
