"""Token ids of other tasks: cut texts, labels of pieces, windows of contexts, masks."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value, load_dataset
from transformers import BertTokenizer, MBart50Tokenizer, PreTrainedTokenizerFast
from writing_setup import tokenizer as byte_level

from hf_distill import InputError
from hf_distill.data.labels import Labels
from hf_distill.data.masked_texts import masking_collator, tokenize_texts
from hf_distill.data.question_windows import tokenize_questions
from hf_distill.data.task_rows import read_labelled, read_questions, read_tagged, read_texts
from hf_distill.data.task_tokens import (
    label_names,
    tokenize_labelled,
    tokenize_source_target,
    tokenize_tagged,
)

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PIECES = ("the", "cat", "dog", "sat", "slept", "on", "who", "mat", "##s", "##ting", ";", "?", ".")
CLS, SEP = 2, 3
CONTEXT = "the cats sat on the mat; the dog slept on the cats."


@lru_cache
def bert() -> Any:
    """A WordPiece tokenizer of 18 tokens, with [CLS] and [SEP]."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *PIECES))}
    return BertTokenizer(vocab=vocabulary, model_max_length=64)


def ids(*tokens: str) -> list[int]:
    return [(*SPECIAL, *PIECES).index(token) for token in tokens]


# ---- Sources and targets ----


def test_sources_and_targets_are_cut_and_counted() -> None:
    texts = ["the dog", "a man " * 20, "print(row) " * 9]
    rows = Dataset.from_dict({"source": texts, "target": ["a", "b", "the fox " * 9]})
    limits = {"max_source_length": 20, "max_target_length": 9}
    found, line = tokenize_source_target(rows, byte_level(), prefix="say: ", **limits)
    assert line == "3 rows tokenized; 2 sources cut at 20 tokens; 1 targets cut at 9 tokens"
    for row, given in zip(found, rows, strict=True):
        source = byte_level()(f"say: {given['source']}", verbose=False)["input_ids"]
        target = byte_level()(given["target"])["input_ids"]
        wanted = [source if len(source) <= 20 else [*source[:19], 0]]
        wanted.append(target if len(target) <= 9 else [*target[:8], 0])
        assert [row["input_ids"], row["labels"]] == wanted


def test_targets_have_the_language_of_targets() -> None:
    given = MBart50Tokenizer(model_max_length=20)
    rows = Dataset.from_dict({"source": ["x"], "target": ["y"]})
    found, _ = tokenize_source_target(
        rows, given, max_source_length=9, max_target_length=9, source_lang="en", target_lang="es"
    )
    english, spanish = given.convert_tokens_to_ids(["en_XX", "es_XX"])
    assert (found[0]["input_ids"][0], found[0]["labels"][0]) == (english, spanish)


# ---- Labels ----


def test_pairs_and_segments() -> None:
    rows, _ = read_labelled(
        Dataset.from_dict(
            {"premise": ["the cats sat", "dog"], "hypothesis": ["who", "mat"], "label": ["b", "a"]}
        )
    )
    found, line = tokenize_labelled(rows, bert(), max_length=6)
    assert line == "2 rows tokenized; 1 cut at 6 tokens"
    # Of the first the longer text lost its end.
    assert found[0]["input_ids"] == [CLS, *ids("the", "cat"), SEP, *ids("who"), SEP]
    assert found[1]["input_ids"] == [CLS, *ids("dog"), SEP, *ids("mat"), SEP]
    assert found[1]["token_type_ids"] == [0, 0, 0, 1, 1]
    assert found["labels"] == [1, 0]
    assert set(found.column_names) == {"input_ids", "token_type_ids", "labels"}


def test_several_labels_and_numbers_stay_floats() -> None:
    several, labels = read_labelled(Dataset.from_dict({"text": ["dog"], "label": [["b"]]}))
    assert tokenize_labelled(several, bert(), max_length=9)[0]["labels"] == [[1.0]]
    assert label_names(labels) == {
        "id2label": {0: "b"}, "label2id": {"b": 0}, "problem_type": "multi_label_classification",
    }  # fmt: skip
    numbers, labels = read_labelled(Dataset.from_dict({"text": ["dog"], "label": [0.5]}))
    assert tokenize_labelled(numbers, bert(), max_length=9)[0]["labels"] == [0.5]
    assert label_names(labels) == {"num_labels": 1, "problem_type": "regression"}


def test_the_first_piece_of_a_token_has_its_tag() -> None:
    """The same token twice in a row, a token of two pieces, and tokens that are cut."""
    given = {"tokens": [["cats", "cats", "sat"], ["the"] * 9], "tags": [[1, 2, 0], [1] * 9]}
    rows, _ = read_tagged(Dataset.from_dict(given))
    found, line = tokenize_tagged(rows, bert(), max_length=8)
    assert found[0]["input_ids"] == [CLS, *ids("cat", "##s", "cat", "##s", "sat"), SEP]
    assert found[0]["labels"] == [-100, 1, -100, 2, -100, 0, -100]
    assert found[1]["labels"] == [-100, *[1] * 6, -100]
    assert line == "2 rows tokenized; 1 without all of their tags within 8 tokens"


def test_byte_level_words_are_those_of_running_text() -> None:
    made = byte_level(ends=False, positions=64)
    found, _ = tokenize_tagged(
        read_tagged(Dataset.from_dict({"tokens": [["the", "dog"]], "tags": [[0, 1]]}))[0],
        made, max_length=60,
    )  # fmt: skip
    assert found[0]["input_ids"] == made(" the dog")["input_ids"]
    assert made("the")["input_ids"] != made(" the")["input_ids"], "the tokenizer is as before"


def test_a_target_ends_where_the_tokenizer_adds_no_end() -> None:
    plain = byte_level(ends=False)
    rows = Dataset.from_list(
        [{"source": "one", "target": "two"}, {"source": "a", "target": "x" * 9}]
    )
    found, line = tokenize_source_target(rows, plain, max_source_length=9, max_target_length=6)
    whole, cut = found["labels"]
    assert whole == [*plain("two")["input_ids"], plain.eos_token_id]
    assert cut == [*plain("x" * 5)["input_ids"], plain.eos_token_id]
    assert "1 targets cut" in line


def test_a_target_that_was_cut_has_no_end() -> None:
    made = byte_level(ends=True, positions=64)
    rows = Dataset.from_dict(
        {"source": ["a", "a"], "target": ["dog", "dog"], "teacher_finished": [True, False]}
    )
    whole, cut = tokenize_source_target(rows, made, max_source_length=9, max_target_length=9)[0][
        "labels"
    ]
    assert whole == [*cut, made.eos_token_id]


# ---- Questions ----


def questions(*answers: tuple[str, int] | None) -> Dataset:
    cells = [
        {"text": [one[0]] if one else [], "answer_start": [one[1]] if one else []}
        for one in answers
    ]
    number = len(answers)
    features = {"text": List(Value("string")), "answer_start": List(Value("int64"))}
    columns = {"question": ["who sat?"] * number, "context": [CONTEXT] * number, "answers": cells}
    features = Features(
        {"question": Value("string"), "context": Value("string"), "answers": features}
    )
    return read_questions(Dataset.from_dict(columns, features=features))


def answer_of(window: dict[str, Any]) -> str:
    """The text that a window's start and end point at; "" for CLS."""
    first, last = window["start_positions"], window["end_positions"]
    if first == last == 0:
        return ""
    return CONTEXT[window["offsets"][first][0] : window["offsets"][last][1]]


@pytest.mark.parametrize("stride", [0, 3, 7])
def test_windows_hold_the_answer_or_point_at_cls(stride: int) -> None:
    text = "the dog slept"
    rows = questions((text, CONTEXT.index(text)), None)
    found, line = tokenize_questions(rows, bert(), max_length=14, stride=stride)
    assert line == "2 rows tokenized; 2 with more than one window of 14 tokens"
    place = CONTEXT.index(text)
    inside, covered = [], set()
    for window in found:
        spans = [span for span in window["offsets"] if span[0] >= 0]
        begin, end = spans[0][0], spans[-1][1]
        whole = begin <= place and place + len(text) <= end and window["row"] == 0
        assert answer_of(window) == (text if whole else "")
        inside.append(whole)
        covered |= set(range(begin, end))
        # CLS, the question's three tokens and the first SEP, then the context, then SEP.
        assert window["input_ids"][:5] == [CLS, *ids("who", "sat", "?"), SEP]
        assert window["answer_mask"] == [1, 0, 0, 0, 0, *[1] * len(spans), 0]
        assert window["offsets"].count([-1, -1]) == 6
    assert covered >= {at for at, mark in enumerate(CONTEXT) if mark != " "}
    assert Counter(found["row"])[0] == Counter(found["row"])[1] > 1
    if stride == 7:
        assert any(inside)


def test_one_window_and_an_answer_inside_a_token() -> None:
    """The answer is "cat" of "cats", the piece that holds it; ";" begins where "mat" ends."""
    given = questions(("cat", 4), ("cats.", 46), (";", 23))
    found, line = tokenize_questions(given, bert(), max_length=40, stride=10)
    assert line == "3 rows tokenized"
    assert [answer_of(window) for window in found] == ["cat", "cats.", ";"]
    assert found[0]["start_positions"] == found[0]["end_positions"] == 6


def test_byte_level_tokens_and_no_cls() -> None:
    """A token holds the space before its word; without CLS the place of no answer is 0."""
    given = questions(("mat", 20), None)
    made = byte_level(ends=True, positions=200)
    found, _ = tokenize_questions(given, made, max_length=90, stride=10)
    assert answer_of(found[0]).strip() == "mat"
    assert found[1]["start_positions"] == found[1]["end_positions"] == 0
    assert found[1]["answer_mask"][0] == 1


# ---- Masked language modelling ----


def test_texts_go_on_in_further_rows() -> None:
    rows = read_texts(Dataset.from_dict({"text": ["the cat sat on the mat", "dog"]}))
    found, line = tokenize_texts(rows, bert(), max_length=6)
    assert found["input_ids"] == [
        [CLS, *ids("the", "cat", "sat", "on"), SEP],
        [CLS, *ids("the", "mat"), SEP],
        [CLS, *ids("dog"), SEP],
    ]
    assert found[2]["special_tokens_mask"] == [1, 0, 1]
    assert line == "2 rows tokenized; 3 rows of at most 6 tokens"


def test_masks_change_and_are_repeatable() -> None:
    rows = read_texts(Dataset.from_dict({"text": ["the cat sat on the mat " * 4] * 40}))
    found, _ = tokenize_texts(rows, bert(), max_length=64)
    collate = masking_collator(bert(), probability=0.3, seed=3)
    first, second = collate(list(found)), collate(list(found))
    assert not torch.equal(first["labels"], second["labels"])
    again = masking_collator(bert(), probability=0.3, seed=3)(list(found))
    assert torch.equal(first["labels"], again["labels"])
    assert torch.equal(first["input_ids"], again["input_ids"])
    special = torch.tensor(found["special_tokens_mask"][:]) == 1
    assert (first["labels"][special] == -100).all()
    share = (first["labels"][~special] != -100).float().mean()
    assert 0.25 < share < 0.35


# ---- What is refused ----

LABELLED = read_labelled(Dataset.from_dict({"text": ["dog"], "label": ["a"]}))[0]
TEXTS = read_texts(Dataset.from_dict({"text": ["dog"]}))
BAD: list[tuple[Any, tuple[Any, ...], dict[str, Any], str]] = [
    (tokenize_labelled, (LABELLED, bert()), {"max_length": 65}, "max_length is 65, .* 2 to 64"),
    (tokenize_texts, (TEXTS, bert()), {"max_length": 1}, "max_length is 1"),
    (tokenize_questions, (questions(None), bert()), {"max_length": 9, "stride": 3},
     "row 0: the question has 3 tokens"),
    (tokenize_questions, (questions(None), bert()), {"max_length": 9, "stride": 9}, "stride is 9"),
    (tokenize_source_target, (TEXTS, byte_level()),
     {"max_source_length": 99, "max_target_length": 9}, "max_source_length is 99"),
    (masking_collator, (byte_level(),), {}, "has no mask token"),
    (masking_collator, (bert(),), {"probability": 1.5}, "probability is 1.5"),
]  # fmt: skip


@pytest.mark.parametrize(("use", "given", "options", "message"), BAD, ids=[b[3] for b in BAD])
def test_bad_input_is_one_clear_line(use: Any, given: Any, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        use(*given, **options)
    assert "\n" not in str(caught.value)


def test_shared_questions(real_data: Path) -> None:
    """Every answer is found again by the positions of some window."""
    file = str(real_data / "small" / "qa_xquad_xquad.en.first200.jsonl")
    rows = read_questions(load_dataset("json", data_files=file, split="train"))
    made: PreTrainedTokenizerFast = byte_level(positions=2000)
    found, _ = tokenize_questions(rows, made, max_length=700, stride=300)
    seen = set()
    for window in found:
        context, answers = (rows[window["row"]][name] for name in ("context", "answers"))
        first, last = window["start_positions"], window["end_positions"]
        if (first, last) == (0, 0):
            continue
        text = context[window["offsets"][first][0] : window["offsets"][last][1]]
        assert answers["text"][0] in text
        seen.add(window["row"])
    assert seen == set(range(200))


def test_labels_of_a_model_are_those_of_the_rows() -> None:
    assert isinstance(LABELLED.features["label"], ClassLabel)
    assert label_names(Labels("single", ("a", "b")))["label2id"] == {"a": 0, "b": 1}
