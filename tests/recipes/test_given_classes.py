"""Rows whose labels have the order of the classes of a model that exists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value, load_from_disk
from run_setup import ROOT, invoke, metrics
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from hf_distill.errors import InputError
from hf_distill.models.from_scratch import train_tokenizer
from hf_distill.recipes import Recipe, load_recipe
from hf_distill.recipes.stages import open_run, prepare

TEXTS = [f"the {word} number {number}" for number in range(12) for word in ("bad", "good")]
NAMES = ["negative", "positive"] * 12
SENTIMENT = {0: "positive", 1: "negative"}
SEVERAL = "multi_label_classification"
TAGS = {0: "I", 1: "O", 2: "B"}


def save(folder: Path, names: dict[int, str] | None, kind: Any = None, **config: Any) -> Path:
    """A tiny classifier with these names of classes, and its tokenizer."""
    tokenizer = train_tokenizer(TEXTS * 2, 280, model_max_length=32, task="sequence-classification")
    named = {"id2label": names} if names else {}
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"vocab_size": 280, "intermediate_size": 24, "pad_token_id": 1}
    torch.manual_seed(0)
    kind = kind or BertForSequenceClassification
    kind(BertConfig(**shape, **(named | config))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(path: Path, labels: list[Any], feature: Any = None) -> Path:
    """Rows in a file, as CSV or, where it holds the type of the labels, as Parquet."""
    given = {"text": TEXTS[: len(labels)], "label": labels}
    if feature is None:
        Dataset.from_dict(given).to_csv(path.with_suffix(".csv"), index=False)
        return path.with_suffix(".csv")
    features = Features({"text": Value("string"), "label": feature})
    Dataset.from_dict(given, features).to_parquet(path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def options(folder: Path, rows: Path, teacher: Any, **more: Any) -> list[str]:
    keys: dict[str, Any] = {
        "output_dir": folder / "runs", "data.train": rows, "data.max_length": 32,
        "data.eval_fraction": 0.25, "tokenizer": "{}", "teacher": teacher,
        "student": "{layers: first_and_last}", "train.eval_strategy": "'no'",
        "train.save_strategy": "'no'", "train.max_steps": 1, "train.global_batch_size": 8,
        "evaluate.speed": "false",
    }  # fmt: skip
    keys |= {key.replace("__", "."): value for key, value in more.items()}
    return [f"{key}={value}" for key, value in keys.items()]


def recipe(*given: Any, **more: Any) -> Recipe:
    return load_recipe(ROOT / "recipes" / "classification.yaml", options(*given, **more))


def prepared(*given: Any, **more: Any) -> Path:
    """`data/` of a recipe of which only the first stage is run."""
    with open_run(recipe(*given, **more), ROOT / "recipes" / "classification.yaml") as run:
        prepare(run)
    return run.folder / "data"


def message(*given: Any, **more: Any) -> str:
    with pytest.raises(InputError) as raised:
        prepared(*given, **more)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def stored(data: Path, split: str = "train") -> dict[str, Any]:
    """The label of each text of a split: its index, or for several labels a list."""
    tokens, texts = (load_from_disk(str(data / part)) for part in (split, f"text/{split}"))
    return dict(zip(texts["text"], tokens["labels"], strict=True))


def expected(data: Path, names: dict[int, str]) -> dict[str, int]:
    by_name = {name: index for index, name in names.items()}
    given = dict(zip(TEXTS, NAMES, strict=True))
    return {text: by_name[given[text]] for text in stored(data)}


def test_a_ready_teacher_is_measured_on_its_own_classes(tmp_path: Path) -> None:
    teacher = save(tmp_path / "teacher", SENTIMENT)
    rows = write(tmp_path / "rows", NAMES)
    words = [word for one in options(tmp_path, rows, teacher) for word in ("--set", one)]
    done = invoke("run", ROOT / "recipes" / "classification.yaml", *words)
    assert done.exit_code == 0, done.output
    folder = tmp_path / "runs" / "classification"
    for split in ("train", "eval"):
        found = {text.split()[1]: label for text, label in stored(folder / "data", split).items()}
        assert found == {"good": 0, "bad": 1}
    labels = json.loads((folder / "data" / "labels.json").read_text())
    assert labels["names"] == [*SENTIMENT.values()]
    for role in ("baseline", "student"):
        model = AutoModelForSequenceClassification.from_pretrained(folder / role)
        assert model.config.id2label == SENTIMENT
    examples = metrics(folder)["examples"]
    assert {one["reference"] for one in examples} <= set(SENTIMENT.values())


ROWS: dict[str, tuple[list[Any], Any]] = {
    "names": (NAMES, None),
    "upper case": ([name.upper() for name in NAMES], None),
    "a type with names": ([0, 1] * 12, ClassLabel(names=["negative", "positive"])),
    "indices": ([1, 0] * 12, None),
    "a type with indices as names": ([1, 0] * 12, ClassLabel(names=["0", "1"])),
}


@pytest.mark.parametrize("form", ROWS)
def test_labels_in_every_form_mean_the_same(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = save(tmp_path / "teacher", SENTIMENT)
    data = prepared(tmp_path, write(tmp_path / "rows", *ROWS[form]), teacher)
    assert stored(data) == expected(data, SENTIMENT)
    told = f"labels are the indices of teacher '{teacher}': 0 is 'positive', 1 is 'negative'"
    assert (told in capsys.readouterr().out) == ("indices" in form)


def test_rows_may_lack_a_class_of_the_teacher(tmp_path: Path) -> None:
    three = {0: "neutral", 1: "positive", 2: "negative"}
    data = prepared(tmp_path, write(tmp_path / "rows", NAMES), save(tmp_path / "teacher", three))
    assert stored(data) == expected(data, three)


def test_several_labels_and_tags(tmp_path: Path) -> None:
    teacher = save(tmp_path / "teacher", SENTIMENT, problem_type=SEVERAL)
    lists = [[name] for name in NAMES]
    several = write(tmp_path / "rows", lists, List(Value("string")))
    data = prepared(tmp_path, several, teacher)
    found = {text: label.index(1.0) for text, label in stored(data).items()}
    assert found == expected(data, SENTIMENT)
    tagger = save(tmp_path / "tagger", TAGS, BertForTokenClassification)
    lines = [{"tokens": text.split()[:2], "tags": ["O", "B"]} for text in TEXTS]
    (tmp_path / "tags.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = prepared(
        tmp_path, tmp_path / "tags.jsonl", tagger, task="token-classification", name="t"
    )
    assert set(map(tuple, load_from_disk(str(data / "text" / "train"))["tags"])) == {(1, 2)}


def test_a_teacher_without_names_of_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = save(tmp_path / "teacher", None)
    rows = write(tmp_path / "rows", NAMES)
    said = message(tmp_path, rows, teacher)
    assert "the rows have the classes negative, positive, but teacher" in said
    assert "only the default names LABEL_0, LABEL_1, which do not say which is which" in said
    kwargs = 'model_kwargs: {id2label: {"0": positive, "1": negative}}'
    data = prepared(tmp_path, rows, f"{{model: {teacher}, {kwargs}}}", name="named")
    assert stored(data) == expected(data, SENTIMENT)
    data = prepared(tmp_path, write(tmp_path / "indices", [1, 0] * 12), teacher, name="indices")
    assert stored(data) == expected(data, SENTIMENT)
    capsys.readouterr()
    typed = write(tmp_path / "typed", [0, 1] * 12, ClassLabel(names=["negative", "positive"]))
    data = prepared(tmp_path, typed, teacher, name="typed")
    assert stored(data) == expected(data, {0: "negative", 1: "positive"})
    told = "which names no classes: 'negative' is LABEL_0, 'positive' is LABEL_1"
    assert told in capsys.readouterr().out


def test_other_classes_than_the_teachers(tmp_path: Path) -> None:
    teacher = save(tmp_path / "teacher", SENTIMENT)
    more = [*NAMES[:-1], "neutral"]
    said = message(tmp_path, write(tmp_path / "rows", more), teacher)
    assert "rows.csv: the rows have the 3 classes neutral, negative, positive; teacher '" in said
    assert "has the 2 classes positive, negative: rename the labels, or set teacher.train" in said
    said = message(tmp_path, write(tmp_path / "rows", [0, 1, 2] * 8), teacher)
    assert "the rows have the 3 classes 0, 1, 2; teacher" in said
    lists = write(tmp_path / "rows", [[name] for name in NAMES], List(Value("string")))
    said = message(tmp_path, lists, teacher)
    assert "'label' holds several labels a row, but teacher" in said
    assert "gives a row one class: set teacher.train, which trains a new head, or give" in said
    said = message(tmp_path, write(tmp_path / "rows", [*NAMES[:-1], None]), teacher)
    assert "row 23: the label is None: leave the row out, or in a recipe move rows" in said


# ---- A teacher that is trained here ----


def test_a_student_with_the_classes_of_the_rows_decides_their_order(tmp_path: Path) -> None:
    trained = f"{{model: {save(tmp_path / 'teacher', None)}, train: {{max_steps: 1}}}}"
    student, rows = save(tmp_path / "student", SENTIMENT), write(tmp_path / "rows", NAMES)
    data = prepared(tmp_path, rows, trained, student=student)
    assert stored(data) == expected(data, SENTIMENT)
    data = prepared(tmp_path, rows, trained, name="alphabetical")
    assert stored(data) == expected(data, {0: "negative", 1: "positive"})
    other = save(tmp_path / "other", {0: "spam", 1: "ham"})
    data = prepared(tmp_path, rows, trained, student=other, name="other")
    assert stored(data) == expected(data, {0: "negative", 1: "positive"})


def test_a_student_with_the_classes_of_its_teacher_in_another_order(tmp_path: Path) -> None:
    teacher = save(tmp_path / "teacher", SENTIMENT)
    student = save(tmp_path / "student", {0: "negative", 1: "positive"})
    said = message(tmp_path, write(tmp_path / "rows", NAMES), teacher, student=student)
    assert said.startswith("class 0 is 'negative' for the student and 'positive' for the teacher")


# ---- Whether they have changed ----


def test_other_classes_make_the_rows_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, rows = save(tmp_path / "student", SENTIMENT), write(tmp_path / "rows", NAMES)
    trained = f"{{model: {save(tmp_path / 'teacher', None)}, train: {{max_steps: 1}}}}"
    given = {"student": student, "tokenizer": tmp_path / "teacher"}
    prepared(tmp_path, rows, trained, **given)
    prepared(tmp_path, rows, trained, **given)
    assert "prepare: unchanged, skipped" in capsys.readouterr().out
    save(tmp_path / "student", {0: "negative", 1: "positive"})
    data = prepared(tmp_path, rows, trained, **given)
    assert "prepare: unchanged" not in capsys.readouterr().out
    assert stored(data) == expected(data, {0: "negative", 1: "positive"})
