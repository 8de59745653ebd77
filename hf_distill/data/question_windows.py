"""Tokenize questions and contexts into windows with the place of the answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset, List, Value
from transformers import PreTrainedTokenizerBase

from hf_distill.data.deduplicate import column
from hf_distill.data.token_rows import (
    IDS,
    Batch,
    Columns,
    check_fast,
    check_length,
    line_of,
    mapped,
    segments,
)
from hf_distill.errors import InputError


def tokenize_questions(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 384,
    stride: int = 128,
    num_proc: int | None = None,
) -> tuple[Dataset, str]:
    """Windows of question and context: `input_ids`, `start_positions`, `end_positions`, ...

    A context that does not fit continues in further windows. Each window repeats `stride` tokens
    of the previous one.

    returns: one row per window with
        `start_positions`, `end_positions`: the first and last token of the first answer; the
            position of the CLS token (0 without one) if the answer is not wholly in the window or
            does not exist
        `answer_mask`: 1 for each token that can be part of an answer (the context's and CLS), else
            0
        `offsets`: first and last + 1 character of each of the context's tokens, [-1, -1] for others
        `row`: the index of the window's row
    raises: InputError for a question that leaves no tokens for the context
    """
    check_length(tokenizer, max_length)
    check_fast(tokenizer, "the characters of a token")
    if not 0 <= stride < max_length:
        raise InputError(f"stride is {stride}, but must be 0 to {max_length - 1}, below max_length")
    number = Value("int32")
    features = {"input_ids": IDS, "start_positions": number, "end_positions": number}
    features |= {"answer_mask": List(Value("int8")), "offsets": List(List(number)), "row": number}
    features |= segments(tokenizer)
    settings = {"tokenizer": tokenizer, "max_length": max_length, "stride": stride}
    numbered = rows.add_column("_row", np.arange(len(rows)))
    found = mapped(numbered, _questions, settings, features, num_proc)
    windows = np.bincount(column(found, "row"), minlength=len(rows))
    line = line_of(rows, {f"with more than one window of {max_length} tokens": windows > 1})
    return found, line


def _questions(
    batch: Batch,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    stride: int,
    version: int,
) -> Columns:
    _check_questions(batch, tokenizer, max_length, stride)
    encoded = tokenizer(
        list(batch["question"]),
        list(batch["context"]),
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    names = ("input_ids", *segments(tokenizer))
    found: Columns = {name: list(encoded[name]) for name in names}
    columns = ("start_positions", "end_positions", "answer_mask", "offsets", "row")
    found |= {name: [] for name in columns}
    for window, sample in enumerate(encoded["overflow_to_sample_mapping"]):
        ids = encoded["input_ids"][window]
        cls = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
        parts = encoded.sequence_ids(window)
        offsets = [
            list(offset) if part == 1 else [-1, -1]
            for offset, part in zip(encoded["offset_mapping"][window], parts, strict=True)
        ]
        start, end = _span(offsets, batch["answers"][sample], cls)
        allowed = [int(at == cls or offset[0] >= 0) for at, offset in enumerate(offsets)]
        values = (start, end, allowed, offsets, batch["_row"][sample])
        for name, value in zip(columns, values, strict=True):
            found[name].append(value)
    return found


def _check_questions(
    batch: Batch, tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int
) -> None:
    questions = tokenizer(list(batch["question"]), add_special_tokens=False, verbose=False)
    special = tokenizer.num_special_tokens_to_add(pair=True)
    for row, ids in zip(batch["_row"], questions["input_ids"], strict=True):
        if len(ids) + special + stride >= max_length:
            raise InputError(
                f"row {row}: the question has {len(ids)} tokens, which leaves none for the context "
                f"beside a stride of {stride} in max_length={max_length}: raise it, or leave out "
                "such rows"
            )


def _span(offsets: list[list[int]], answers: Mapping[str, Any], cls: int) -> tuple[int, int]:
    """First and last token of the first answer in a window; CLS where it is not wholly in it."""
    context = [at for at, offset in enumerate(offsets) if offset[0] >= 0]
    if not answers["text"] or not context:
        return cls, cls
    begin = answers["answer_start"][0]
    end = begin + len(answers["text"][0])
    if offsets[context[0]][0] > begin or offsets[context[-1]][1] < end:
        return cls, cls
    first = next(at for at in context if offsets[at][1] > begin)
    last = next(at for at in reversed(context) if offsets[at][0] < end)
    return first, last
