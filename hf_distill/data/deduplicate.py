"""Find exact and near duplicates among rows, and rows similar to evaluation rows.

MinHash signatures stay on disk in the Arrow table. The hashes of one band, their order, and a hash
of each row's targets are in memory: at most about 60 bytes per row of any length.
"""

from __future__ import annotations

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from hf_distill.data.hashing import PERMUTATIONS, Hashes, mix

# 16 bands of 4: two rows of similarity 0.8 share a band with probability 0.9998, of 0.5 with 0.64;
# rows that share a band are then compared by the whole signature.
BANDS = 16
_WIDTH = PERMUTATIONS // BANDS
_ROUNDS = 32  # comparisons of one row within one band, at most
_GATHER = 1 << 15  # pairs compared at once: 2 x 8 MB of signatures

Mask = NDArray[np.bool_]
Indices = NDArray[np.int64]


class Signatures:
    """The signatures of some rows of a table, read from disk as they are needed."""

    def __init__(self, *parts: tuple[Dataset, Indices]) -> None:
        """parts: examined rows, and the indices of those that count; parts follow one another."""
        self._chunks: list[NDArray[np.uint32]] = []
        rows, learnt, starts = [], [], [0]
        for dataset, indices in parts:
            rows.append(indices + starts[-1])
            learnt.append(column(dataset, "_learnt")[indices])
            for chunk in dataset.data.column("_signature").chunks:
                self._chunks.append(chunk.flatten().to_numpy().reshape(-1, PERMUTATIONS))
                starts.append(starts[-1] + len(chunk))
        self._starts = np.array(starts)
        self._rows = np.concatenate(rows)
        self._learnt = np.concatenate(learnt)

    def __len__(self) -> int:
        return len(self._rows)

    def band(self, number: int) -> Hashes:
        """(rows,) hash of one band of every row."""
        inside = slice(number * _WIDTH, (number + 1) * _WIDTH)
        hashes = [_fold(chunk[:, inside]) for chunk in self._chunks]
        return np.concatenate(hashes)[self._rows]

    def similar(self, first: Indices, second: Indices, threshold: float, learnt: bool) -> Mask:
        """(pairs,) whether the estimated Jaccard similarity reaches the threshold.

        learnt: rows must also have the same targets
        """
        found = np.empty(len(first), dtype=bool)
        for start in range(0, len(first), _GATHER):
            part = slice(start, start + _GATHER)
            equal = self._gather(first[part]) == self._gather(second[part])
            found[part] = equal.mean(axis=1) >= threshold
        return found & (self._learnt[first] == self._learnt[second]) if learnt else found

    def _gather(self, indices: Indices) -> NDArray[np.uint32]:
        rows = self._rows[indices]
        out = np.empty((len(rows), PERMUTATIONS), dtype=np.uint32)
        places = np.searchsorted(self._starts, rows, side="right") - 1
        for place in np.unique(places):
            inside = places == place
            out[inside] = self._chunks[place][rows[inside] - self._starts[place]]
        return out


def repeated(hashes: Hashes) -> Mask:
    """(rows,) True for every row whose hash an earlier row has."""
    _, first = np.unique(hashes, return_index=True)
    mask = np.ones(len(hashes), dtype=bool)
    mask[first] = False
    return mask


def smallest(keys: Hashes, fraction: float) -> Mask:
    """(rows,) True for the rows with the smallest of the distinct keys, at least one of them."""
    distinct = np.unique(keys)
    return keys <= distinct[max(1, round(fraction * len(distinct))) - 1]


def near_repeated(signatures: Signatures, threshold: float) -> Mask:
    """(rows,) True for every row that is similar to an earlier one and has the same targets."""
    return _similar_to_leader(signatures, threshold, len(signatures), learnt=True)


def near_evaluation(signatures: Signatures, evaluation_rows: int, threshold: float) -> Mask:
    """(rows,) True for every later row that is similar to one of the first ``evaluation_rows``."""
    return _similar_to_leader(signatures, threshold, evaluation_rows, learnt=False)


def _similar_to_leader(
    signatures: Signatures, threshold: float, leaders: int, *, learnt: bool
) -> Mask:
    """Band by band: sort, and compare each row with the first of its bucket, then the second, ...

    leaders: only rows before this index can mark others as duplicates; if they are fewer than all
        rows, they are never marked themselves
    A marked row is not compared again, so that a chain of small changes is not followed to its end.
    """
    gone = np.zeros(len(signatures), dtype=bool)
    protected = leaders if leaders < len(signatures) else 0
    for band in range(BANDS):
        hashes = signatures.band(band)
        members = np.flatnonzero(~gone)
        members = members[np.argsort(hashes[members], kind="stable")]
        hashes = hashes[members]
        for _ in range(_ROUNDS):
            if len(members) < 2:
                break
            head = np.append(True, hashes[1:] != hashes[:-1])
            leader = np.repeat(members[head], np.diff(np.append(np.flatnonzero(head), len(head))))
            rest = ~head & (leader < leaders)
            leader, members, hashes = leader[rest], members[rest], hashes[rest]
            match = members >= protected
            match[match] = signatures.similar(leader[match], members[match], threshold, learnt)
            gone[members[match]] = True
            members, hashes = members[~match], hashes[~match]
    return gone


def column(dataset: Dataset, name: str) -> NDArray:
    """A column of numbers as one array."""
    chunks = dataset.data.column(name).chunks
    return np.concatenate([chunk.to_numpy(zero_copy_only=False) for chunk in chunks])


def _fold(band: NDArray[np.uint32]) -> Hashes:
    hashes = np.zeros(len(band), dtype=np.uint64)
    for values in band.T:
        hashes = mix(hashes ^ values)
    return hashes
