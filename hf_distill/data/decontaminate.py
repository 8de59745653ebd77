"""Find training rows that overlap with an evaluation row, by sequences of 13 words.

One common sequence proves little, since unrelated rows share licence headers and prompt templates.
A training row is removed only if it holds a given share of the sequences of one evaluation row, or
if one evaluation row holds that share of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from numpy.typing import NDArray

from hf_distill.data.clean import VERSION, iterate, row_text
from hf_distill.data.config import Format
from hf_distill.data.deduplicate import Mask, column
from hf_distill.data.hashing import Hashes, ngram_hashes, word_hashes

NGRAM_WORDS = 13  # as in GPT-3 (arXiv:2005.14165, appendix C)
_OWNERS = 16  # evaluation rows remembered for one sequence: rows of one text share all of theirs


@dataclass(frozen=True)
class _Index:
    """hashes: (entries,) sorted; owners: (entries,) evaluation row of each; totals: (rows,)."""

    hashes: Hashes
    owners: NDArray[np.int32]
    totals: NDArray[np.int32]

    def largest_share(self, text: str) -> float:
        """The larger of: share of an evaluation row that is in the text, and the reverse."""
        grams = _grams(text)
        first = np.searchsorted(self.hashes, grams, side="left")
        counts = np.searchsorted(self.hashes, grams, side="right") - first
        if not counts.any():
            return 0.0
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        owners = self.owners[np.repeat(first, counts) + within]
        rows, common = np.unique(owners, return_counts=True)
        return float(np.max(common / np.minimum(self.totals[rows], len(grams))))


def contained(
    train: Dataset,
    evaluation: Dataset,
    names: tuple[Format, Format],
    threshold: float,
    num_proc: int | None,
) -> Mask:
    """(training rows,) True where the larger share of common sequences reaches the threshold.

    names: the formats of training and evaluation rows
    Memory: 12 bytes per word of the evaluation rows.
    """
    index = _index(evaluation, names[1])
    if not len(index.hashes) or not len(train):
        return np.zeros(len(train), dtype=bool)
    shares = train.map(
        _shares,
        batched=True,
        batch_size=200,
        fn_kwargs={"index": index, "name": names[0], "version": VERSION},
        remove_columns=train.column_names,
        features=Features({"share": Value("float64")}),
        num_proc=num_proc,
        desc="compare with evaluation rows",
    )
    return column(shares, "share") >= threshold


def _shares(
    batch: Mapping[str, Sequence[Any]], index: _Index, name: Format, version: int
) -> dict[str, list[float]]:
    return {"share": [index.largest_share(row_text(row, name)) for row in iterate(batch)]}


def _index(evaluation: Dataset, name: Format) -> _Index:
    grams = [_grams(row_text(row, name)) for row in evaluation]
    totals = np.array([len(row) for row in grams], dtype=np.int32)
    owners = np.repeat(np.arange(len(totals), dtype=np.int32), totals)
    hashes = np.concatenate(grams)
    order = np.argsort(hashes, kind="stable")
    hashes, owners = hashes[order], owners[order]
    # The place of an entry among those of the same hash.
    rank = np.arange(len(hashes)) - np.searchsorted(hashes, hashes, side="left")
    return _Index(hashes[rank < _OWNERS], owners[rank < _OWNERS], totals)


def _grams(text: str) -> Hashes:
    """The distinct sequences of a text; none if the text is shorter than a sequence."""
    words = word_hashes(text)
    return np.unique(ngram_hashes(words, NGRAM_WORDS)) if len(words) >= NGRAM_WORDS else words[:0]
