"""The rows of each task as batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from hf_distill.data import collator, masking_collator
from hf_distill.losses.targets import IGNORE
from hf_distill.recipes.schema import Recipe
from hf_distill.tasks.question_answering import ANSWER_MASK

Rows = Sequence[Mapping[str, Any]]
Collate = Callable[[Any], dict[str, Any]]

# Columns of rows that are no part of a batch.
NOTES = ("offsets", "row")


def collator_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Collate:
    """The collator for the rows that the recipe prepares. See `data.task_tokens`."""
    pad: Any
    if recipe.task == "causal-lm":
        return collator(tokenizer)
    if recipe.task == "masked-lm":
        return MaskOnce(tokenizer, recipe.data.mask_probability)
    if recipe.task == "seq2seq-lm":
        pad = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORE)
    elif recipe.task == "token-classification":
        pad = DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORE)
    else:
        pad = DataCollatorWithPadding(tokenizer)
    return _Padding(pad, tokenizer.padding_side)


class _Padding:
    """Pads rows as a collator of transformers does, and their `answer_mask` with zeros."""

    def __init__(self, pad: Any, side: str) -> None:
        self._pad, self._side = pad, side

    def __call__(self, rows: Rows) -> dict[str, Any]:
        kept = [{k: v for k, v in row.items() if k not in (ANSWER_MASK, *NOTES)} for row in rows]
        batch = dict(self._pad(kept))
        if ANSWER_MASK in rows[0]:
            mask = torch.zeros_like(batch["input_ids"])
            for row, of_row in enumerate(rows):
                given = torch.as_tensor(of_row[ANSWER_MASK])
                if self._side == "right":
                    mask[row, : len(given)] = given
                else:
                    mask[row, mask.shape[1] - len(given) :] = given
            batch[ANSWER_MASK] = mask
        return batch


class MaskOnce:
    """Masks the tokens of rows, and only pads rows that have labels, whose tokens are masked."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float) -> None:
        self._mask = masking_collator(tokenizer, probability=probability)
        self._pad = collator(tokenizer)

    def __call__(self, rows: Rows) -> dict[str, Any]:
        if all(row.get("labels") is not None for row in rows):
            return self._pad(rows)
        return dict(self._mask([{"input_ids": row["input_ids"]} for row in rows]))
