"""Pack several documents into rows of ``max_length`` tokens, so that there is little padding.

Attention either crosses the border between documents, which are then separated by the end-of-text
token only, or stays within a document. In the second case positions restart at 0 with each
document. ``transformers`` and flash attention recognise this and keep documents apart, provided
that they get no attention mask and no cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from numpy.typing import NDArray

from hf_distill.data.preparation_table import Step
from hf_distill.losses.targets import IGNORE

_OPEN_BLOCKS = 64

Ints = NDArray[np.int32]
Piece = tuple[Ints, Ints]  # ids and labels of a document or a part of one
Block = list[Piece]


class Filler(Protocol):
    """Takes documents one by one and yields blocks as they become full."""

    def add(self, ids: Ints, labels: Ints) -> Iterator[Block]:
        """Add a document."""

    def flush(self) -> Iterator[Block]:
        """The remaining blocks, after the last document."""


class Splitter:
    """Blocks of exactly ``max_length`` tokens: a document goes on in the next block."""

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length
        self._block: Block = []
        self._room = max_length

    def add(self, ids: Ints, labels: Ints) -> Iterator[Block]:
        while len(ids):
            self._block.append((ids[: self._room], labels[: self._room]))
            taken = len(self._block[-1][0])
            ids, labels = ids[taken:], labels[taken:]
            self._room -= taken
            if not self._room:
                yield from self.flush()

    def flush(self) -> Iterator[Block]:
        if self._block:
            yield self._block
        self._block, self._room = [], self._max_length


class Fitter:
    """Blocks of whole documents; each goes into the open block where it leaves the least space."""

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length
        self._blocks: list[tuple[int, Block]] = []  # room and pieces, in the order of opening

    def add(self, ids: Ints, labels: Ints) -> Iterator[Block]:
        rooms = [(room, place) for place, (room, _) in enumerate(self._blocks) if room >= len(ids)]
        if rooms:
            room, place = min(rooms)
            block = self._blocks[place][1]
        else:
            room, place, block = self._max_length, len(self._blocks), []
            self._blocks.append((room, block))
        block.append((ids, labels))
        self._blocks[place] = (room - len(ids), block)
        if room == len(ids):
            yield self._blocks.pop(place)[1]
        elif len(self._blocks) > _OPEN_BLOCKS:
            yield self._blocks.pop(0)[1]

    def flush(self) -> Iterator[Block]:
        yield from (block for _, block in self._blocks)
        self._blocks = []


def pack(
    rows: Dataset, split: str, max_length: int, *, whole: bool, within: bool
) -> tuple[Dataset, Step]:
    """Pack rows into rows of up to ``max_length`` tokens, in one pass and one process.

    rows: ``input_ids`` and ``labels``
    whole: keep each document in one row (none may be longer than ``max_length``); otherwise all
        rows but the last are full
    within: add ``position_ids`` that restart with each document, whose first token is then no
        target; otherwise that token is predicted from the end of the document before
    """
    names = ["input_ids", "labels", *(["position_ids"] if within else [])]
    packed = rows.with_format("arrow").map(
        _Packer(len(rows), max_length, whole, within),
        batched=True,
        batch_size=1000,
        with_indices=True,
        remove_columns=rows.column_names,
        features=Features({name: List(Value("int32")) for name in names}),
        desc=f"pack {split}",
    )
    packed = packed.with_format(None)
    tokens = targets = 0
    for batch in packed.with_format("arrow").iter(1000):
        for _, labels in documents(batch):
            tokens += len(labels)
            targets += int((labels[1:] != IGNORE).sum())
    return packed, Step("pack", split, len(packed), tokens=tokens, targets=targets)


class _Packer:
    """The function for ``map``, called batch after batch; it carries unfinished blocks over."""

    def __init__(self, rows: int, max_length: int, whole: bool, within: bool) -> None:
        self._last = rows - 1
        self._within = within
        self._filler: Filler = Fitter(max_length) if whole else Splitter(max_length)

    def __call__(self, table: pa.Table, indices: list[int]) -> dict[str, list[Ints]]:
        blocks = [block for piece in documents(table) for block in self._filler.add(*piece)]
        if indices[-1] == self._last:
            blocks += self._filler.flush()
        rows = [row for block in blocks if (row := join(block, self._within))]
        names = ["input_ids", "labels", *(["position_ids"] if self._within else [])]
        return {name: [row[name] for row in rows] for name in names}


def pack_batch(
    batch: Mapping[str, Sequence[Any]], max_length: int, whole: bool, within: bool
) -> dict[str, list[list[int]]]:
    """One batch of rows packed by itself, as a stream needs it; see ``pack``."""
    filler: Filler = Fitter(max_length) if whole else Splitter(max_length)
    blocks: list[Block] = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        piece = np.asarray(ids, dtype=np.int32), np.asarray(labels, dtype=np.int32)
        blocks += filler.add(*piece)
    blocks += filler.flush()
    rows = [row for block in blocks if (row := join(block, within))]
    names = ["input_ids", "labels", *(["position_ids"] if within else [])]
    return {name: [row[name].tolist() for row in rows] for name in names}


def documents(table: pa.Table) -> Iterator[Piece]:
    """Ids and labels of each row of an Arrow table."""
    ids, labels = (table.column(name).combine_chunks() for name in ("input_ids", "labels"))
    offsets = ids.offsets.to_numpy() - ids.offsets[0].as_py()
    flat_ids, flat_labels = ids.flatten().to_numpy(), labels.flatten().to_numpy()
    for start, end in pairwise(offsets.tolist()):
        yield flat_ids[start:end], flat_labels[start:end]


def join(block: Block, within: bool) -> dict[str, Ints] | None:
    """One row made of the pieces, or None if it would hold no target."""
    labels = np.concatenate([labels for _, labels in block])
    positions = np.concatenate([np.arange(len(ids), dtype=np.int32) for ids, _ in block])
    if within:
        labels = np.where(positions == 0, np.int32(IGNORE), labels)
    if not (labels[1:] != IGNORE).any():
        return None
    row = {"input_ids": np.concatenate([ids for ids, _ in block]), "labels": labels}
    return row | {"position_ids": positions} if within else row
