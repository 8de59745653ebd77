"""Rows of padded batches without their padding, and batches of such rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hf_distill.data import TEACHER_PROMPT_IDS, prompt_length
from hf_distill.errors import InputError
from hf_distill.losses.targets import IGNORE
from hf_distill.recordings.collator import ALL_NAMES
from hf_distill.tasks import TARGET_INDEX

# The entries of a batch that can be made for generated rows.
KNOWN = {"input_ids", "attention_mask", "labels", "ce_weight", "divergence_weight", TARGET_INDEX}
KNOWN |= {"decoder_input_ids", "decoder_attention_mask", TEACHER_PROMPT_IDS, *ALL_NAMES}


@dataclass
class Row:
    """A row without padding.

    ids, labels: of the data; for an encoder-decoder, source and target
    prompt: the ids that the student continues
    recorded: the teacher's recording by name, (positions, ...) each
    teacher_prompt: the ids that the teacher reads in place of the prompt
    completion: the ids that the student has generated; None for a data row
    """

    ids: list[int]
    labels: list[int]
    prompt: list[int]
    recorded: dict[str, Tensor] = field(default_factory=dict)
    teacher_prompt: list[int] | None = None
    completion: list[int] | None = None

    @property
    def written(self) -> bool:
        """Whether the student has written its completion."""
        return self.completion is not None

    def input_ids(self, encoder_decoder: bool) -> list[int]:
        """What the model reads; an encoder-decoder reads its source."""
        if self.completion is None:
            return self.ids
        return self.prompt if encoder_decoder else self.prompt + self.completion

    def all_labels(self, encoder_decoder: bool) -> list[int]:
        """The labels. Prompt tokens are no targets."""
        if self.completion is None:
            return self.labels
        before = [] if encoder_decoder else [IGNORE] * len(self.prompt)
        return before + self.completion

    def for_teacher(self, encoder_decoder: bool) -> Row:
        """The row with the teacher's prompt in place of the student's, and the same targets."""
        prompt = self.teacher_prompt
        if prompt is None:
            raise InputError(
                f"a row has no {TEACHER_PROMPT_IDS}, but others have: give one to each"
            )
        if self.written or encoder_decoder:
            return replace(self, ids=prompt, prompt=prompt)
        start = len(self.prompt)
        if any(label != IGNORE for label in self.labels[1:start]):
            raise InputError(
                f"a row with {TEACHER_PROMPT_IDS} has labels in its prompt, which differs from the "
                "teacher's: set labels to -100 there"
            )
        labels = [IGNORE] * len(prompt) + self.labels[start:]
        return replace(self, ids=prompt + self.ids[start:], labels=labels)


def read_rows(batch: Mapping[str, Any], *, encoder_decoder: bool, prompt_tokens: int) -> list[Row]:
    """The rows of a padded batch.

    prompt_tokens: the prompt of a row without one of its own, as plain text
    """
    ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
    mask = batch.get("attention_mask")
    masks = torch.ones_like(batch["input_ids"]).tolist() if mask is None else mask.tolist()
    prompts = batch.get(TEACHER_PROMPT_IDS) or [None] * len(ids)
    tables = {name: batch[name].cpu() for name in ALL_NAMES if name in batch}
    found = []
    for number, (row, label, seen) in enumerate(zip(ids, labels, masks, strict=True)):
        real = [token for token, there in zip(row, seen, strict=True) if there]
        kept = [token != IGNORE for token in label] if encoder_decoder else [bool(x) for x in seen]
        wanted = [token for token, keep in zip(label, kept, strict=True) if keep]
        prompt = real if encoder_decoder else real[: prompt_length(wanted, prompt_tokens)]
        places = torch.tensor(kept)
        recorded = {name: table[number][places] for name, table in tables.items()}
        found.append(Row(real, wanted, prompt, recorded, prompts[number]))
    return found


def batch_of(rows: Sequence[Row], pad_token_id: int, *, encoder_decoder: bool) -> dict[str, Tensor]:
    """Ids, mask and labels of some rows, and their recordings, padded on the right, on the CPU.

    returns: (rows, positions) int64 each; a recording has zeros where a row was written
    """
    ids = [row.input_ids(encoder_decoder) for row in rows]
    labels = [row.all_labels(encoder_decoder) for row in rows]
    batch = {
        "input_ids": _padded(ids, pad_token_id),
        "attention_mask": _padded([[1] * len(row) for row in ids], 0),
        "labels": _padded(labels, IGNORE),
    }
    for name in rows[0].recorded if rows else ():
        batch[name] = _table(name, rows, batch["labels"].shape[1])
    return batch


def _table(name: str, rows: Sequence[Row], positions: int) -> Tensor:
    first = rows[0].recorded[name]
    fill = -1 if name == "teacher_ids" else 0
    table = first.new_full((len(rows), positions, *first.shape[1:]), fill)
    for number, row in enumerate(rows):
        if not row.written:
            values = row.recorded[name]
            table[number, : len(values)] = values
    return table


def _padded(rows: list[list[int]], value: int) -> Tensor:
    longest = max([1, *map(len, rows)])
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])
