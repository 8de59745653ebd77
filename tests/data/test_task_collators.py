"""Batches of the rows of every task, and masks that are made once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from task_text import word_pieces
from transformers import PreTrainedTokenizerFast

from hf_distill import InputError
from hf_distill.data import TaskCollator, mask_rows, tokenize_texts

MASK = 4


def batch(task: str, rows: list[dict[str, Any]], tokenizer: Any = None, **options: Any) -> Any:
    found = TaskCollator(task, tokenizer or word_pieces(), **options)(rows)
    return {name: value.tolist() for name, value in found.items()}


def test_aligned_labels_are_padded_as_the_ids() -> None:
    rows = [
        {"input_ids": [2, 6, 3], "labels": [-100, 1, -100], "left": "out"},
        {"input_ids": [2], "labels": [-100]},
    ]
    for padding_side in ("right", "left"):  # whatever the tokenizer says
        found = batch("token-classification", rows, word_pieces(padding_side=padding_side))
        assert found["input_ids"] == [[2, 6, 3], [2, 0, 0]]
        assert found["labels"] == [[-100, 1, -100], [-100, -100, -100]]
        assert found["attention_mask"] == [[1, 1, 1], [1, 0, 0]]
        assert "left" not in found


def test_target_texts_have_their_own_length() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [8]}, {"input_ids": [5], "labels": [8, 9, 10, 11]}]
    found = batch("seq2seq-lm", rows, word_pieces(padding_side="left"))
    assert found["input_ids"] == [[5, 6, 7], [5, 0, 0]]
    assert found["labels"] == [[8, -100, -100, -100], [8, 9, 10, 11]]
    assert found.keys() == {"input_ids", "labels", "attention_mask"}


@pytest.mark.parametrize("name", ["label", "labels"])
@pytest.mark.parametrize("labels", [[1, -100], [[0.0, 1.0], [1.0, 0.0]], [0.5, -1.0]])
def test_labels_of_rows(name: str, labels: list[Any]) -> None:
    rows = [{"input_ids": [2, 3], name: labels[0]}, {"input_ids": [2, 6, 3], name: labels[1]}]
    found = batch("sequence-classification", rows)
    assert (found["labels"], found["input_ids"]) == (labels, [[2, 3, 0], [2, 6, 3]])


def test_where_answers_may_be() -> None:
    rows = [
        {"input_ids": [2, 6, 3], "start_positions": 1, "end_positions": 1,
         "answer_mask": [1, 1, 0]},
        {"input_ids": [2, 6], "start_positions": 0, "end_positions": 0, "answer_mask": [0, 1],
         "offsets": [[0, 1], [1, 2]], "row": 1},
    ]  # fmt: skip
    found = batch("question-answering", rows, word_pieces(padding_side="left"))
    assert found["answer_mask"] == [[1, 1, 0], [0, 1, 0]]
    assert (found["start_positions"], found["end_positions"]) == ([1, 0], [1, 0])
    assert not found.keys() & {"offsets", "row"}
    bare = [{k: v for k, v in row.items() if k != "answer_mask"} for row in rows]
    assert "answer_mask" not in batch("question-answering", bare)


def test_masks_at_each_call_and_labels_that_are_given() -> None:
    rows = [{"input_ids": [2, *[6, 7, 8] * 4, 3]}, {"input_ids": [2, 9, 3]}]
    collate = TaskCollator("masked-lm", word_pieces(), probability=0.5, seed=1)
    first, second = collate(rows), collate(rows)
    assert not torch.equal(first["labels"], second["labels"])
    again = TaskCollator("masked-lm", word_pieces(), probability=0.5, seed=1)(rows)
    assert torch.equal(first["labels"], again["labels"])
    learnt = first["labels"] != -100
    assert 2 < int(learnt[0].sum()) < 11
    assert not (learnt & (first["attention_mask"] == 0)).any()
    given = [
        {"input_ids": [2, MASK, 3], "labels": [-100, 6, -100]},
        {"input_ids": [2], "labels": [-100]},
    ]
    found = batch("masked-lm", given)
    assert found["labels"] == [[-100, 6, -100], [-100] * 3]
    assert found["input_ids"][0] == [2, MASK, 3]


def test_rows_are_masked_once() -> None:
    texts = Dataset.from_dict({"text": ["the cats sat on the red mat . " * 3] * 40})
    rows, _ = tokenize_texts(texts, word_pieces(), max_length=20)
    found = mask_rows(rows, word_pieces(), probability=0.3, seed=2)
    assert found.to_list() == mask_rows(rows, word_pieces(), probability=0.3, seed=2).to_list()
    assert found.to_list() != mask_rows(rows, word_pieces(), probability=0.3, seed=3).to_list()
    masked = learnable = 0
    for row, before in zip(found, rows, strict=True):
        for now, label, was, special in zip(
            row["input_ids"], row["labels"], before["input_ids"], before["special_tokens_mask"],
            strict=True,
        ):  # fmt: skip
            assert label in (was, -100)
            assert now == was or label == was
            assert label == -100 or not special
            masked, learnable = masked + (label != -100), learnable + (not special)
    assert masked / learnable == pytest.approx(0.3, abs=0.03)
    # A row's mask depends neither on the rows before it nor on those beside it.
    assert mask_rows(rows.select([0]), word_pieces(), probability=0.3, seed=2)[0] == found[0]


def test_tokenizers_that_lack_a_token(tiny_tokenizer: Any) -> None:
    collate = TaskCollator("masked-lm", tiny_tokenizer)
    assert collate([{"input_ids": [3], "labels": [3]}])["labels"].tolist() == [[3]]
    with pytest.raises(InputError, match="no mask token"):
        collate([{"input_ids": [3]}])
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="neither a padding nor an end-of-text token"):
        TaskCollator("seq2seq-lm", bare)
    bare.eos_token = "<|endoftext|>"
    found = batch("seq2seq-lm", [{"input_ids": [4]}, {"input_ids": [4, 5]}], bare)
    assert found["input_ids"] == [[4, 0], [4, 5]]
    assert bare.pad_token is None  # the user's own is not changed
