"""Rows of other tasks: every form they come in, and one clear line for each row that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value, load_dataset

from hf_distill import InputError
from hf_distill.data.labels import Labels
from hf_distill.data.task_rows import (
    read_labelled,
    read_questions,
    read_source_target,
    read_tagged,
    read_texts,
)


def rows(**columns: Any) -> Dataset:
    return Dataset.from_dict(columns)


# ---- Sources and targets ----


@pytest.mark.parametrize(
    ("given", "columns"),
    [
        ({"document": ["a b"], "summary": ["a"]}, None),
        ({"highlights": ["a"], "article": ["a b"], "id": ["x"]}, None),
        ({"text": ["a b"], "summary": ["a"]}, None),
        ({"source": ["a b"], "target": ["a"]}, None),
        ({"body": ["a b"], "tldr": ["a"]}, {"source": "body", "target": "tldr"}),
        (
            {"translation": [{"en": "a b", "es": "a"}]},
            {"source": "translation.en", "target": "translation.es"},
        ),
        (
            {"translation": [{"en": "a", "es": "a b"}]},
            {"source": "translation.es", "target": "translation.en"},
        ),
    ],
)
def test_sources_and_targets(given: Any, columns: Any) -> None:
    found = read_source_target(rows(**given), columns)
    assert found.to_list() == [{"source": "a b", "target": "a"}]


def test_texts() -> None:
    assert read_texts(rows(content=["a"]))["text"] == ["a"]
    assert read_texts(rows(body=["a"]), {"text": "body"})["text"] == ["a"]


# ---- Questions ----

CONTEXT = "the cat sat; the cat slept"


@pytest.mark.parametrize(
    ("answers", "wanted"),
    [
        ({"answers": {"text": ["cat"], "answer_start": [17]}}, [("cat", 17)]),
        ({"answers": [{"text": "cat", "answer_start": 4}, {"text": "sat", "answer_start": 8}]},
         [("cat", 4), ("sat", 8)]),
        ({"answer": "slept", "answer_start": 21}, [("slept", 21)]),
        ({"answer_text": "sat"}, [("sat", 8)]),
        ({"answers": ["sat", "cat"]}, [("sat", 8), ("cat", 4)]),
        ({"answers": {"text": ["cat"], "answer_start": [16]}}, [("cat", 17)]),  # the nearest place
        ({"answers": {"text": ["cat"], "answer_start": [-9]}}, [("cat", 4)]),
        ({"answers": {"text": [], "answer_start": []}}, []),
        ({"answers": {"text": ["cat"], "answer_start": [4]}, "is_impossible": True}, []),
        ({"answer": ""}, []),
    ],
)  # fmt: skip
def test_answers_in_every_form(answers: dict[str, Any], wanted: list[tuple[str, int]]) -> None:
    given = rows(question=["who?"], context=[CONTEXT], **{k: [v] for k, v in answers.items()})
    found = read_questions(given)[0]
    texts, starts = [text for text, _ in wanted], [start for _, start in wanted]
    assert found["answers"] == {"text": texts, "answer_start": starts}
    assert (found["id"], found["question"], found["context"]) == ("0", "who?", CONTEXT)


# ---- Labels ----


def test_classes_by_name_index_and_type() -> None:
    named, labels = read_labelled(rows(text=["x", "y", "z"], label=["b", "a", "b"]))
    assert (named["label"], labels) == ([1, 0, 1], Labels("single", ("a", "b")))
    numbered, labels = read_labelled(rows(text=["x", "y"], label=[2, 0]))
    assert (numbered["label"], labels.names) == ([2, 0], ("0", "1", "2"))
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    typed = Dataset.from_dict({"text": ["x"], "label": [1]}, features=features)
    found, labels = read_labelled(typed)
    assert (found["label"], labels.names) == ([1], ("no", "yes"))
    assert found.features["label"].names == ["no", "yes"]
    again, _ = read_labelled(rows(text=["x"], label=["yes"]), labels=labels)
    assert again["label"] == [1]
    told, _ = read_labelled(rows(text=["x"], label=["a"]), names=["b", "a"])
    assert told["label"] == [1]


def test_a_class_label_in_another_order_keeps_its_meaning() -> None:
    known = Labels("single", ("bad", "good"))
    feature = ClassLabel(names=["good", "bad"])
    given = rows(text=["x", "y"], label=[0, 1]).cast_column("label", feature)
    assert read_labelled(given, labels=known)[0]["label"] == [1, 0]
    words = Features({"tokens": List(Value("string")), "tags": List(feature)})
    tagged = Dataset.from_dict({"tokens": [["x", "y"]], "tags": [[0, 1]]}, features=words)
    assert read_tagged(tagged, labels=known)[0]["tags"] == [[1, 0]]


def test_several_labels_and_numbers() -> None:
    several, labels = read_labelled(rows(text=["x", "y", "z"], labels=[["c", "a"], [], ["b"]]))
    assert labels == Labels("several", ("a", "b", "c"))
    assert several["label"] == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    numbers, labels = read_labelled(rows(sentence1=["x"], sentence2=["y"], score=[2.5]))
    assert labels == Labels("regression")
    assert numbers.to_list() == [{"text": "x", "pair": "y", "label": 2.5}]


@pytest.mark.parametrize(
    "lists",
    [
        [[0, 1, 1], [1, 0, 0], [0, 0, 0]],
        [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
        [[False, True, True], [True, False, False], [False, False, False]],
    ],
)
def test_lists_of_zeros_and_ones_for_the_classes(lists: list[list[Any]]) -> None:
    found, labels = read_labelled(rows(text=["x", "y", "z"], labels=lists))
    assert labels == Labels("several", ("0", "1", "2"))
    assert found["label"] == [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    named = Labels("several", ("a", "b", "c"))
    assert (
        read_labelled(rows(text=["x", "y", "z"], labels=lists), labels=named)[0]["label"]
        == (found["label"])
    )
    if isinstance(lists[0][0], float):
        with pytest.raises(
            InputError,
            match="0 or 1 for each of 2 classes: .* of 3 n",
        ):
            read_labelled(rows(text=["x", "y", "z"], labels=lists), names=["a", "b"])


def test_lists_of_indices_stay_indices() -> None:
    for lists in ([[0, 2], [1], []], [[0], [1], [0]], [[0, 1], [0, 1], [2, 1]]):
        found, labels = read_labelled(rows(text=["x", "y", "z"], labels=lists))
        width = len(labels.names)
        assert found["label"] == [[float(i in row) for i in range(width)] for row in lists]


def test_words_without_a_tag() -> None:
    given = rows(tokens=[["x", "y", "z"]], tags=[[1, -100, 0]])
    assert read_tagged(given)[0]["tags"] == [[1, -1, 0]]
    with pytest.raises(InputError, match="'tokens' is text, not a list of words"):
        read_tagged(rows(tokens=["ab"], tags=[[0, 1]]))


@pytest.mark.parametrize(
    "names",
    [
        ("premise", "hypothesis"),
        ("sentence1", "sentence2"),
        ("question1", "question2"),
        ("question", "sentence"),
    ],
)
def test_pairs(names: tuple[str, str]) -> None:
    given = rows(idx=[0], label=[1], **{names[1]: ["second"], names[0]: ["first"]})
    assert read_labelled(given)[0].to_list() == [{"text": "first", "pair": "second", "label": 1}]
    told = {"text": names[1]}
    assert read_labelled(given, told)[0].to_list() == [{"text": "second", "label": 1}]


def test_tags() -> None:
    features = Features(
        {"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "PER"]))}
    )
    typed = Dataset.from_dict({"tokens": [["Ann", "sat"]], "ner_tags": [[1, 0]]}, features=features)
    found, labels = read_tagged(typed)
    assert (found["tags"], labels) == ([[1, 0]], Labels("single", ("O", "PER")))
    named, labels = read_tagged(rows(words=[["Ann", "sat"]], tags=[["PER", "O"]]))
    assert (named["tags"], labels.names) == ([[1, 0]], ("O", "PER"))


# ---- What is refused ----

NAMES = Labels("single", ("a", "b"))
BAD: list[tuple[Any, tuple[Any, ...], dict[str, Any], str]] = [
    (read_source_target, (rows(document=["a", " "], summary=["b", "c"]),), {},
     "row 1: 'document' is empty"),
    (read_source_target, (rows(document=["a"], summary=[None]),), {},
     "row 0: 'summary' holds None"),
    (read_source_target, (rows(document=[1], summary=["a"]),), {}, "holds int, not text"),
    (read_source_target, (rows(a=["x"], b=["y"]),), {}, "hold no known source and target"),
    (read_source_target, (rows(translation=[{"en": "a", "es": "b"}]),), {}, "name both"),
    (read_source_target,
     (rows(translation=[{"en": "a"}]), {"source": "translation.en", "target": "translation.fr"}),
     {}, "row 0: there is no 'translation.fr', only en"),
    (read_source_target, (rows(document=["a"], summary=["b"]).select([]),), {}, "has no rows"),
    (read_questions, (rows(question=["q"], context=["c"], answer=["dog"]),), {},
     "row 0: the context does not contain the answer 'dog'"),
    (read_questions, (rows(question=["q"], context=["c"]),), {},
     r"hold no answers: name it by columns=\{'answers': ...\} \(in a recipe data.columns\)"),
    (read_questions, (rows(question=["q"], context=[""], answer=["c"]),), {}, "'context' is empty"),
    (read_questions,
     (rows(question=["q"], context=["c"], answers=[{"text": ["c"], "answer_start": [0, 1]}]),), {},
     "1 answers and 2 starts"),
    (read_labelled, (rows(text=["x", "y"], label=["a", "c"]),), {"labels": NAMES},
     r"row 1: the label 'c' is none of the 2 classes \(a, b\)"),
    (read_labelled, (rows(text=["x"], label=[2]),), {"labels": NAMES}, "the label 2 is none"),
    (read_labelled, (rows(text=["x", "y"], label=[0, -1]),), {}, "holds the label -1"),
    (read_labelled, (rows(text=["x", "y"], label=["a", None]),), {},
     "row 1: the label is None: leave .* move rows without a label to data.unlabelled"),
    (read_labelled, (rows(text=["x"], label=[["a", "b"]]),), {"labels": NAMES},
     "needs lists everywhere"),
    (read_labelled, (rows(text=["x"], label=["a"]),), {"labels": Labels("several", ("a",))},
     "give lists only"),
    (read_labelled, (rows(text=["x", "y"], label=[1.0, float("nan")]),), {},
     "row 1: the label is nan"),
    (read_labelled, (rows(text=["x"], label=[None]),), {}, "holds no label:"),
    (read_labelled, (rows(text=["x"], label=["a"]), {"txt": "text"}), {}, "columns has 'txt'"),
    (read_labelled, (rows(text=["x"], label=["a"]), {"text": "body"}), {}, "names 'body'"),
    (read_tagged, (rows(tokens=[["a", "b"]], tags=[[0]]),), {}, "row 0: there are 2 tokens and 1"),
    (read_tagged, (rows(tokens=[["a"], []], tags=[[0], []]),), {}, "row 1: 'tokens' is empty"),
    (read_texts, (rows(text=[""]),), {}, "row 0: 'text' is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("read", "given", "options", "message"), BAD, ids=[b[3] for b in BAD])
def test_bad_rows_are_one_clear_line(read: Any, given: Any, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(*given, **options)
    assert "\n" not in str(caught.value)


# ---- Real data ----


def test_shared_sets(real_data: Path) -> None:
    def load(name: str) -> Dataset:
        return load_dataset("json", data_files=str(real_data / "small" / name), split="train")

    banking, labels = read_labelled(load("cls_banking77_train.first200.jsonl"))
    assert labels.kind == "single"
    first = json.loads((real_data / "small/cls_banking77_train.first200.jsonl").open().readline())
    assert labels.names[banking[0]["label"]] == first["label"]
    columns = {"source": "translation.en", "target": "translation.es"}
    assert len(read_source_target(load("mt_tatoeba_en_es_train.first200.jsonl"), columns)) == 200
    assert len(read_source_target(load("summ_scitldr_train.first200.jsonl"))) == 200
    for name in ("qa_xquad_xquad.en", "qa_adversarial_quoref_train"):
        for row in read_questions(load(f"{name}.first200.jsonl")):
            for text, at in zip(*row["answers"].values(), strict=True):
                assert row["context"][at : at + len(text)] == text
