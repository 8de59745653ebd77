"""Collate rows that carry recordings: verify each one and scatter it to the targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_distill.errors import InputError
from hf_distill.losses.targets import IGNORE
from hf_distill.recordings import codec
from hf_distill.recordings.row_format import COLUMN, Header, read, row_hash
from hf_distill.tasks import CausalLM, Task

# What a batch carries: (rows, positions, ...) each, zeros where there is no target.
NAMES = {
    "top_k": ("teacher_ids", "teacher_log_probs", "teacher_log_tail"),
    "sampled": ("teacher_ids", "teacher_weights", "teacher_entropy"),
    "full": ("teacher_logits",),
}
ALL_NAMES = frozenset(name for names in NAMES.values() for name in names)


def header_of(value: bytes, where: str) -> Header:
    """The header of a row's recording; InputError where it is damaged."""
    try:
        return read(value)[0]
    except codec.Damaged as damage:
        raise InputError(f"the recording of {where} is damaged: {damage}; record it again") from (
            damage
        )


@dataclass(frozen=True)
class RecordingCollator:
    """Wraps a collator: recordings are taken out, verified, and scattered to the targets.

    collator: rows to a padded batch with labels
    expected: the kind, k, temperature, vocabulary, teacher and tokenizer that every row must have;
        `row` and `targets` are not compared
    mixed: rows may have different teachers; task: decides which positions are targets
    returns: the collator's batch and the tensors of `NAMES`; the batch alone where no row has a
        recording
    raises: InputError naming the row in the batch and the reason
    """

    collator: Callable[[list[Any]], dict[str, Any]]
    expected: Header
    mixed: bool = False
    task: Task = field(default_factory=CausalLM)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        plain = [{k: v for k, v in row.items() if k != COLUMN} for row in rows]
        batch = self.collator(plain)
        values = [row.get(COLUMN) for row in rows]
        if all(value is None for value in values):
            return batch
        labels = self.task.labels(batch)
        starts = starts_of(self.task, batch, len(rows))
        decoded = []
        for number, (row, value) in enumerate(zip(plain, values, strict=True)):
            if value is None:
                raise InputError(f"row {number} of a batch has no recording, but others have")
            header, content = self._verified(number, value)
            targets = (labels[number] != IGNORE).nonzero()[:, 0].numpy()
            ids = np.asarray(row["input_ids"])
            here = row_hash(
                ids, targets - starts[number], labels[number, targets], row.get("position_ids")
            )
            if header.row != here:
                raise InputError(_belongs_elsewhere(number, header, len(targets)))
            decoded.append((_decoded(content, header, number), targets))
        return {**batch, **_scattered(self.expected, decoded, labels)}

    def _verified(self, number: int, value: bytes) -> tuple[Header, bytes]:
        where = f"row {number} of a batch"
        header_of(value, where)
        header, content = read(value)
        expected = replace(self.expected, row=header.row, targets=header.targets)
        if self.mixed:
            expected = replace(expected, teacher=header.teacher)
        for name, remedy in _REMEDIES.items():
            found, wanted = getattr(header, name), getattr(expected, name)
            unknown = name == "tokenizer" and 0 in (found, wanted)
            if found != wanted and not unknown:
                shown = (
                    f"{x:016x}" if name in ("teacher", "tokenizer") else x for x in (found, wanted)
                )
                raise InputError(
                    "the recording of {} has {} {}, but {} is expected: {}".format(
                        where, name, *shown, remedy
                    )
                )
        return header, content


_REMEDIES = {
    "kind": "record all rows in one way",
    "temperature": "set `temperature` to that of the recording, or record again at yours",
    "k": "record all rows with one k",
    "vocabulary": "record all rows with one teacher and tokenizer",
    "teacher": "rows of several teachers are mixed only with mixed_recordings=True",
    "tokenizer": "record with the tokenizer of the training",
}


def _belongs_elsewhere(number: int, header: Header, targets: int) -> str:
    same = "its input ids, targets or documents have changed since"
    counted = f"it was made for {header.targets} targets, and the batch has {targets}"
    return (
        f"the recording of row {number} of a batch belongs to another row: "
        f"{same if header.targets == targets else counted}; record after tokenizing, packing and "
        "masking, with the collator of the training"
    )


def starts_of(task: Task, batch: Mapping[str, Any], rows: int) -> list[int]:
    """The position of each row's first token in the padded batch; targets are counted from it."""
    mask = batch.get("attention_mask")
    if not task.aligned or mask is None or mask.dim() != 2:
        return [0] * rows
    return (mask != 0).int().argmax(-1).tolist()


def _decoded(content: bytes, header: Header, number: int) -> Any:
    n, vocabulary = header.targets, header.vocabulary
    try:
        if header.kind == "top_k":
            return codec.decode_top_k(content, n, header.k, vocabulary)
        if header.kind == "sampled":
            return codec.decode_sampled(content, n, vocabulary)
        return codec.decode_full(content, n, vocabulary)
    except codec.Damaged as damage:
        raise InputError(
            f"the recording of row {number} of a batch is damaged: {damage}; record it again"
        ) from damage


def _scattered(header: Header, decoded: list[Any], labels: Tensor) -> dict[str, Tensor]:
    kind = header.kind
    rows: list[tuple[Any, tuple[Any, ...]]] = []
    for number, (content, targets) in enumerate(decoded):
        wanted = labels[number, targets].numpy()
        if kind == "top_k":
            ids, log_probs = _with_label(content, wanted, header.vocabulary)
            rows.append((targets, (ids, log_probs, content.log_tail)))
        elif kind == "sampled":
            draws = np.maximum(content.counts.sum(1, keepdims=True), 1)
            weights = (content.counts / draws).astype(np.float32)
            rows.append((targets, (content.ids, weights, content.entropy)))
        else:
            rows.append((targets, (content,)))
    found = {}
    for index, name in enumerate(NAMES[kind]):
        first = rows[0][1][index]
        width = (
            max((parts[index].shape[1] for _, parts in rows), default=1)
            if (first.ndim == 2)
            else None
        )
        empty = -1 if name == "teacher_ids" else 0
        shape = labels.shape if width is None else (*labels.shape, max(width, 1))
        dtype = torch.int64 if name == "teacher_ids" else torch.float32
        tensor = torch.full(shape, empty, dtype=dtype)
        for number, (targets, parts) in enumerate(rows):
            part = torch.tensor(parts[index])
            where = tensor[number] if width is None else tensor[number, :, : part.shape[1]]
            where[torch.from_numpy(targets)] = part.to(dtype)
        found[name] = tensor
    return found


def _with_label(content: codec.TopK, labels: Any, vocabulary: int) -> tuple[Any, Any]:
    """Ids and log-probabilities, with the label as one more id where it is not among them.

    vocabulary: how many ids the teacher has; a label beyond them is not one of its ids
    """
    outside = ~np.isnan(content.log_label) & (labels < vocabulary)
    label = np.where(outside, labels, -1)[:, None]
    log_label = np.nan_to_num(content.log_label)[:, None]
    ids = np.concatenate([content.ids, label], axis=1)
    return ids, np.concatenate([content.log_probs, log_label], axis=1)
