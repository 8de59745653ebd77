"""Pad rows of different lengths to a batch of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_distill.errors import InputError
from hf_distill.losses.targets import IGNORE


@dataclass(frozen=True)
class Collator:
    """Pads rows to the longest of the batch. Call it with a list of rows.

    Rows hold ``input_ids``, perhaps ``labels`` (default: the ids), ``attention_mask`` (where they
    are padded already) and, if packed documents must not see each other, ``position_ids``.
    Everything else in them is left out.

    returns: int64 tensors (rows, positions): ``input_ids``, ``labels`` (padding ``IGNORE``), and
    - for plain rows ``attention_mask`` (1 for tokens, 0 for padding);
    - for packed rows ``position_ids`` and no ``attention_mask``, because models look for packed
      documents only without one. Padding is then one more document, without targets.
    """

    pad_token_id: int
    filler_token_id: int
    """Padding of packed rows: no mask hides it, so it must be a token that every model has."""
    padding_side: Literal["right", "left"] = "right"
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids, masks, labels = (list(column) for column in zip(*map(_tensors, rows), strict=True))
        packed = [row.get("position_ids") is not None for row in rows]
        if any(packed) != all(packed):
            raise InputError("a batch mixes rows with and without position_ids: pack all or none")
        if all(packed):
            positions = [torch.as_tensor(row["position_ids"], dtype=torch.long) for row in rows]
            return {
                "input_ids": self._pad(ids, self.filler_token_id),
                "labels": self._pad(labels, IGNORE),
                "position_ids": self._pad(positions, None),
            }
        batch = {
            "input_ids": self._pad(ids, self.pad_token_id),
            "attention_mask": self._pad(masks, 0),
            "labels": self._pad(labels, IGNORE),
        }
        if self.padding_side == "left":
            # Nothing predicts a row's first token: before it there is only padding.
            first = batch["attention_mask"].cumsum(dim=1) <= 1
            batch["labels"] = batch["labels"].masked_fill(first, IGNORE)
        return batch

    def _pad(self, rows: Sequence[Tensor], value: int | None) -> Tensor:
        """(rows, positions); value None: the padding counts from 0."""
        length = max(len(row) for row in rows)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        padded = []
        for row in rows:
            missing = length - len(row)
            padding = torch.arange(missing) if value is None else row.new_full((missing,), value)
            parts = (row, padding) if self.padding_side == "right" else (padding, row)
            padded.append(torch.cat(parts))
        return torch.stack(padded)


def _tensors(row: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and labels of one row; labels made here leave its padding out."""
    ids = torch.as_tensor(row["input_ids"], dtype=torch.long)
    given, labels = row.get("attention_mask"), row.get("labels")
    mask = torch.ones_like(ids) if given is None else torch.as_tensor(given, dtype=torch.long)
    if labels is None:
        return ids, mask, ids.masked_fill(mask == 0, IGNORE)
    return ids, mask, torch.as_tensor(labels, dtype=torch.long)


def collator(
    tokenizer: PreTrainedTokenizerBase,
    *,
    padding_side: Literal["right", "left"] = "right",
    pad_to_multiple_of: int | None = None,
) -> Collator:
    """A ``Collator`` with the tokenizer's padding token, or its end-of-text token if it has none.

    pad_to_multiple_of: round lengths up to a multiple, for tensor cores
    raises: InputError if the tokenizer has neither token
    """
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    known = [token for token in (pad, end) if token is not None]
    if not known:
        raise InputError("the tokenizer has neither a padding nor an end-of-text token: set one")
    return Collator(known[0], known[-1], padding_side, pad_to_multiple_of)
