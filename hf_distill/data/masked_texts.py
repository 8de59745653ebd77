"""Tokenize text for masked language modelling, and mask it."""

from __future__ import annotations

from datasets import Dataset, List, Value
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from hf_distill.data.token_rows import (
    IDS,
    Batch,
    Columns,
    check_fast,
    check_length,
    line_of,
    mapped,
)
from hf_distill.errors import InputError


def tokenize_texts(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    num_proc: int | None = None,
) -> tuple[Dataset, str]:
    """Rows of `text`: `input_ids` and `special_tokens_mask`; long texts go on in further rows."""
    check_length(tokenizer, max_length)
    check_fast(tokenizer, "the rest of a long text")
    features = {"input_ids": IDS, "special_tokens_mask": List(Value("int8"))}
    settings = {"tokenizer": tokenizer, "max_length": max_length}
    found = mapped(rows, _texts, settings, features, num_proc)
    return found, f"{line_of(rows, {})}; {len(found):,} rows of at most {max_length} tokens"


def _texts(
    batch: Batch, tokenizer: PreTrainedTokenizerBase, max_length: int, version: int
) -> Columns:
    encoded = tokenizer(
        list(batch["text"]),
        truncation=True,
        max_length=max_length,
        return_overflowing_tokens=True,
        return_special_tokens_mask=True,
    )
    return {name: list(encoded[name]) for name in ("input_ids", "special_tokens_mask")}


def masking_collator(
    tokenizer: PreTrainedTokenizerBase, *, probability: float = 0.15, seed: int | None = None
) -> DataCollatorForLanguageModeling:
    """A collator that masks random tokens at each call, with `labels` for the masked ones.

    probability: that a token is masked; seed: of the random choice
    raises: InputError for a tokenizer without a mask token
    """
    if tokenizer.mask_token is None:
        raise InputError(
            "the tokenizer has no mask token: give the tokenizer of a masked language model, such "
            "as BERT"
        )
    if not 0 < probability < 1:
        raise InputError(f"probability is {probability}, but must be between 0 and 1")
    return DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability, seed=seed)
