"""Encode the ids of each target of a row, sorted lists of equal or different lengths.

There are two layouts, and the encoder takes the smaller one:

by target   the gaps along each list. Frequent tokens have low ids, so that gaps grow along it: each
            quarter of a list has a Rice parameter of its own.
by id       as the index of a book: the ids that occur, how often (Elias gamma codes), and for each
            of them the gaps between the targets that have it, whose Rice parameter follows from how
            often. In a row of some hundred targets the same few thousand ids occur again and again,
            which saves a fifth.
"""

from __future__ import annotations

import numpy as np

from hf_distill.recordings.bits import (
    PARAMETERS,
    WIDEST,
    Bytes,
    Damaged,
    Ints,
    Stream,
    best_parameters,
    pack,
    pack_unary,
    rice,
    unpack,
    unpack_unary,
    unrice,
)

BY_TARGET, BY_ID = 0, 1
QUARTERS = 4
POWERS = 1 << np.arange(WIDEST)


def encode_lists(ids: Ints, lengths: Ints) -> list[Bytes]:
    """The bytes of all lists, in parts.

    ids: those of the first target, ascending, then those of the next; lengths: (targets,)
    """
    layouts = (_by_target(ids, lengths), _by_id(ids, lengths))
    sizes = [sum(part.nbytes for part in parts) for parts in layouts]
    chosen = int(np.argmin(sizes))
    return [np.array([chosen], np.uint8), *layouts[chosen]]


def decode_lists(stream: Stream, lengths: Ints, vocabulary: int) -> Ints:
    """The ids that `encode_lists` was given, from the rest of a stream. raises: Damaged"""
    if not len(lengths):  # a row without a target has no bytes
        return np.zeros(0, np.int64)
    (layout,) = stream.take("u1", 1)
    if layout not in (BY_TARGET, BY_ID):
        raise Damaged(f"its ids have an unknown layout {layout}")
    read = _read_by_target if layout == BY_TARGET else _read_by_id
    ids = read(stream, lengths)
    if len(ids) and ids.max() >= vocabulary:
        raise Damaged(f"id {ids.max()} is beyond the {vocabulary} of the vocabulary")
    return ids


# ---- By target ----


def _by_target(ids: Ints, lengths: Ints) -> list[Bytes]:
    gaps = np.diff(ids, prepend=-1) - 1
    first = _firsts(lengths)
    gaps[first] = ids[first]
    return _best_rice(gaps, _quarters(lengths), QUARTERS * len(lengths))


def _read_by_target(stream: Stream, lengths: Ints) -> Ints:
    gaps = _best_unrice(stream, _quarters(lengths), QUARTERS * len(lengths))
    return _running(gaps, lengths)


def _quarters(lengths: Ints) -> Ints:
    """The group of each gap: which target, and which quarter of its list."""
    target = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(target)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return QUARTERS * target + place * QUARTERS // np.repeat(lengths, lengths)


# ---- By id ----


def _by_id(ids: Ints, lengths: Ints) -> list[Bytes]:
    targets = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((targets, ids))
    known, counts = np.unique(ids, return_counts=True)
    targets = targets[order]
    gaps = np.diff(targets, prepend=-1) - 1
    first = _firsts(counts)
    gaps[first] = targets[first]
    widths = np.repeat(_parameters(counts, len(lengths)), counts)
    names = _best_rice(np.diff(known, prepend=-1) - 1, np.zeros(len(known), np.int64), 1)
    sizes = np.searchsorted(POWERS, counts, side="right") - 1  # bits of a count but its first
    prefixes = pack_unary(sizes)
    numbers = np.array([len(known), names[-1].nbytes, prefixes.nbytes], "<u4").view(np.uint8)
    return [numbers, *names, prefixes, pack(counts - POWERS[sizes], sizes), *rice(gaps, widths)]


def _read_by_id(stream: Stream, lengths: Ints) -> Ints:
    number, size_of_names, size_of_prefixes = (int(n) for n in stream.take("<u4", 3))
    gaps = _best_unrice(stream, np.zeros(number, np.int64), 1, size_of_names)
    known = np.cumsum(gaps + 1) - 1
    sizes = unpack_unary(stream.take("u1", size_of_prefixes), number)
    if len(sizes) != number or sizes.max(initial=0) >= len(POWERS):
        raise Damaged("it does not say how often its ids occur")
    counts = POWERS[sizes] + unpack(stream.take("u1", -(-int(sizes.sum()) // 8)), sizes)
    if counts.sum() != lengths.sum():
        raise Damaged("there are not as many ids as the targets have")
    widths = np.repeat(_parameters(counts, len(lengths)), counts)
    targets = _running(unrice(stream, widths), counts)
    if not np.array_equal(np.bincount(targets, minlength=len(lengths)), lengths):
        raise Damaged("the targets do not have as many ids as they must")
    return np.repeat(known, counts)[np.argsort(targets, kind="stable")]


def _parameters(counts: Ints, targets: int) -> Ints:
    """The Rice parameter for the gaps of an id, from how many of the targets have it."""
    half = (targets - counts) // (2 * (counts + 1))  # of the mean gap
    return np.minimum(np.searchsorted(POWERS, half, side="right"), PARAMETERS - 1)


# ---- Both ----


def _best_rice(gaps: Ints, group: Ints, groups: int) -> list[Bytes]:
    """Rice codes of gaps after the best parameter of each group. group: (n,), its number"""
    parameters = best_parameters(gaps, group, groups)
    return [pack(parameters, np.full(groups, 4)), *rice(gaps, parameters[group])]


def _best_unrice(stream: Stream, group: Ints, groups: int, unary: int | None = None) -> Ints:
    parameters = unpack(stream.take("u1", -(-groups // 2)), np.full(groups, 4))
    return unrice(stream, parameters[group], unary)


def _firsts(lengths: Ints) -> Ints:
    """The places where lists begin, those that are not empty."""
    return (np.cumsum(lengths) - lengths)[lengths > 0]


def _running(gaps: Ints, lengths: Ints) -> Ints:
    """The values whose gaps these are, list after list."""
    sums = np.cumsum(gaps + 1)
    first = _firsts(lengths)
    before = sums[first] - gaps[first] - 1
    return sums - np.repeat(before, lengths[lengths > 0]) - 1
