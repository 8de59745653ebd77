"""What all tokenizing of rows of other tasks shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from hf_distill.errors import InputError

VERSION = 3  # part of every cache key: raise it when the same settings would give other rows
IDS = List(Value("int32"))
SEGMENTS = "token_type_ids"  # of BERT and its relatives: which of two texts a token is in

Batch = Mapping[str, Sequence[Any]]
Columns = dict[str, list[Any]]


def mapped(
    rows: Dataset,
    function: Any,
    settings: dict[str, Any],
    features: Mapping[str, Any],
    num_proc: int | None = None,
) -> Dataset:
    """The rows of token ids and their notes that `function` makes of batches of rows."""
    return rows.map(
        function,
        batched=True,
        batch_size=200,
        fn_kwargs={**settings, "version": VERSION},
        remove_columns=rows.column_names,
        features=Features(dict(features)),
        num_proc=num_proc,
        desc="tokenize",
    )


def segments(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The feature of the column that says which of two texts a token is in, if models read it."""
    return {SEGMENTS: IDS} if SEGMENTS in tokenizer.model_input_names else {}


def line_of(rows: Dataset, marked: Mapping[str, Any]) -> str:
    """How many rows there are, and how many of them are marked."""
    parts = [f"{int(flags.sum()):,} {what}" for what, flags in marked.items() if flags.any()]
    return "; ".join([f"{len(rows):,} row{'s' if len(rows) > 1 else ''} tokenized", *parts])


def check_length(tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """InputError for a length that the tokenizer's model does not take."""
    limit = tokenizer.model_max_length
    if not 2 <= max_length <= limit:
        raise InputError(
            f"max_length is {max_length}, but must be 2 to {limit}, the limit of the tokenizer's "
            "model"
        )


def check_fast(tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    """InputError for a tokenizer that does not report where its tokens come from."""
    if not tokenizer.is_fast:
        raise InputError(
            f"the tokenizer is a {type(tokenizer).__name__}, which does not report {what}: use a "
            "fast one (PreTrainedTokenizerFast)"
        )
