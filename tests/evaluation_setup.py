"""A pair of models that differ, a tokenizer of forty words, and rows, for evaluation's tests."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from trainer_setup import VOCABULARY, make_rows, small_model
from trainer_setup import collate as collate_right
from transformers import PreTrainedTokenizerFast

ROWS = make_rows(13, seed=5)
# The same, each with a prompt of two tokens.
PROMPTED = [
    {"input_ids": row["input_ids"], "labels": [-100, -100, *row["input_ids"][2:]]} for row in ROWS
]
WORDS = ["<end>", "<pad>", *(f"{'ab' * (i % 4)}{i}" for i in range(2, VOCABULARY))]


def tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    model = WordLevel({word: index for index, word in enumerate(words)}, unk_token="<end>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), eos_token="<end>", pad_token="<pad>"
    )


def pair(architecture: str = "gpt2", **teacher: Any) -> tuple[Any, Any]:
    return small_model(3, architecture), small_model(4, architecture, layers=2, **teacher)


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    return collate_right([dict(row) for row in rows])


def collate_left(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Left padding, and no position ids."""
    flipped = collate([{name: values[::-1] for name, values in row.items()} for row in rows])
    return {name: torch.flip(values, (1,)) for name, values in flipped.items()}
