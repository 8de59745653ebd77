"""Encode a teacher's outputs at the targets of one row in few bytes, and decode them.

There are three kinds, each with its own `encode` and `decode` for all arrays of a row.

top_k   The k likeliest ids in ascending order, as Rice-coded gaps with one parameter for each
        quarter of the list: frequent tokens have low ids, so that gaps grow along it. The `EXACT`
        largest log-probabilities in float16; the others as one of 31 levels, evenly spaced between
        the smallest of those and the smallest of all. The log of the remaining mass in float32.
        The label's log-probability if it is not among the k. Decoding scales the probabilities so
        that they sum to one with the tail.
sampled The ids of draws from the distribution and how often each was drawn (RS-KD,
        arXiv:2503.16870), and the entropy of the distribution.
full    Every log-probability.

docs/recording.md has sizes at V = 50257, and the error of the gradient from quantisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_distill.recordings.bits import (
    Bytes,
    Ints,
    best_parameters,
    pack,
    pack_unary,
    unpack,
    unpack_unary,
)

Floats = NDArray[np.float32]

VERSION = 1
KINDS = ("top_k", "sampled", "full")
EXACT = 8
BITS = 5  # of a level; the highest one marks a value that is stored exactly
MARK = 2**BITS - 1
QUARTERS = 4
LEAST = (
    -1e4
)  # smaller log-probabilities are raised to this, which float16 holds; its probability is 0
LEAST_TAIL = -80.0
RANGE = (
    24.0  # most nats that the levels span, so that an id without probability does not coarsen them
)


class Damaged(ValueError):
    """The bytes are not what an encoder wrote."""


@dataclass(frozen=True)
class TopK:
    """ids: (targets, k) int64, ascending; log_probs: (targets, k) float32
    log_tail: (targets,) float32, of the mass that no id of these has
    log_label: (targets,) float32, NaN where the label is among the ids
    """

    ids: Ints
    log_probs: Floats
    log_tail: Floats
    log_label: Floats


@dataclass(frozen=True)
class Sampled:
    """ids: (targets, most) int64, -1 beyond a target's own; counts: the same shape, 0 there
    entropy: (targets,) float32, in nats
    """

    ids: Ints
    counts: Ints
    entropy: Floats


def encode_top_k(content: TopK) -> bytes:
    """The bytes of `top_k`. Values below `LEAST` are raised to it."""
    n, k = content.ids.shape
    log_probs = np.maximum(content.log_probs, LEAST).astype(np.float32)
    outside = ~np.isnan(content.log_label)
    parts: list[Any] = [np.maximum(content.log_tail, LEAST_TAIL).astype("<f4")]
    parts += [np.packbits(outside)]
    parts += [np.maximum(content.log_label[outside], LEAST).astype("<f2")]
    if k > EXACT:
        largest = np.argpartition(-log_probs, EXACT - 1, axis=1)[:, :EXACT]
        codes = np.zeros((n, k), np.int64)
        np.put_along_axis(codes, largest, MARK, axis=1)
        exact = codes == MARK
        kept = log_probs[exact].astype("<f2")
        high = kept.astype(np.float32).reshape(n, EXACT).min(1, keepdims=True)
        least = np.maximum(log_probs.min(1, keepdims=True), high - RANGE).astype("<f2")
        low = least.astype(np.float32)
        span = np.minimum(low - high, -1e-6)
        level = np.rint((log_probs - high) / span * MARK - 1).clip(0, MARK - 1)
        codes = np.where(exact, MARK, level).astype(np.int64)
        parts += [kept, least, pack(codes.ravel(), np.full(n * k, BITS))]
    else:
        parts += [log_probs.astype("<f2")]
    gaps = np.diff(content.ids, axis=1, prepend=-1) - 1
    parts += _rice(gaps.ravel(), _quarters(n, k), n * QUARTERS)
    return b"".join(part.tobytes() for part in parts)


def decode_top_k(data: bytes, n: int, k: int, vocabulary: int) -> TopK:
    """The n targets that `encode_top_k` wrote. raises: Damaged"""
    stream = _Stream(data)
    log_tail = stream.take("<f4", n)
    outside = np.unpackbits(stream.take("u1", -(-n // 8)), count=n).astype(bool)
    log_label = np.full(n, np.nan, np.float32)
    log_label[outside] = stream.take("<f2", int(outside.sum()))
    if k > EXACT:
        kept = stream.take("<f2", n * EXACT).astype(np.float32)
        low = stream.take("<f2", n).astype(np.float32)[:, None]
        codes = unpack(stream.take("u1", -(-n * k * BITS // 8)), np.full(n * k, BITS))
        codes = codes.reshape(n, k)
        exact = codes == MARK
        if (exact.sum(1) != EXACT).any():
            raise Damaged("a target does not have as many exact values as it must")
        high = kept.reshape(n, EXACT).min(1, keepdims=True)
        log_probs = (high + (low - high) * (codes + 1) / MARK).astype(np.float32)
        log_probs[exact] = kept
    else:
        log_probs = stream.take("<f2", n * k).astype(np.float32).reshape(n, k)
    gaps = _unrice(stream, _quarters(n, k), n * QUARTERS)
    ids = np.cumsum(gaps.reshape(n, k) + 1, axis=1) - 1
    if ids.size and ids[:, -1].max() >= vocabulary:
        raise Damaged(f"id {ids[:, -1].max()} is beyond the {vocabulary} of the vocabulary")
    return TopK(ids, _normalised(log_probs, log_tail, log_label), log_tail, log_label)


def encode_sampled(content: Sampled) -> bytes:
    """The bytes of `sampled`: gaps between sorted ids, and how often each was drawn."""
    drawn = content.counts > 0
    lengths = drawn.sum(1)
    gaps = np.diff(np.where(drawn, content.ids, 0), axis=1, prepend=-1)[drawn] - 1
    group = np.repeat(np.arange(len(lengths)), lengths)
    counts = pack_unary(content.counts[drawn] - 1)
    parts: list[Any] = [lengths.astype("<u2"), content.entropy.astype("<f4")]
    parts += [np.array([len(counts)], "<u4"), counts, *_rice(gaps, group, len(lengths))]
    return b"".join(part.tobytes() for part in parts)


def decode_sampled(data: bytes, n: int, vocabulary: int) -> Sampled:
    """The n targets that `encode_sampled` wrote. raises: Damaged"""
    stream = _Stream(data)
    if n == 0 and not data:  # a row without a target
        return Sampled(np.zeros((0, 0), np.int64), np.zeros((0, 0), np.int64), np.zeros(0, "<f4"))
    lengths = stream.take("<u2", n).astype(np.int64)
    entropy = stream.take("<f4", n)
    (size,) = stream.take("<u4", 1)
    counts = unpack_unary(stream.take("u1", int(size)), int(lengths.sum())) + 1
    group = np.repeat(np.arange(n), lengths)
    gaps = _unrice(stream, group, n)
    drawn = np.arange(lengths.max(initial=0))[None] < lengths[:, None]
    ids = np.zeros(drawn.shape, np.int64)
    all_counts = np.zeros(drawn.shape, np.int64)
    if len(counts) != len(gaps):
        raise Damaged("there are not as many counts as ids")
    ids[drawn] = gaps + 1
    all_counts[drawn] = counts
    ids = np.where(drawn, np.cumsum(ids, axis=1) - 1, -1)
    if ids.max(initial=-1) >= vocabulary:
        raise Damaged(f"id {ids.max()} is beyond the {vocabulary} of the vocabulary")
    return Sampled(ids, all_counts, entropy)


def encode_full(log_probs: Floats) -> bytes:
    """The bytes of `full`: (targets, ids) as they are, float32 or float16."""
    return log_probs.tobytes()


def decode_full(data: bytes, n: int, vocabulary: int) -> Floats:
    """(targets, ids) float32. The size tells whether float32 or float16 was written."""
    dtype = "<f4" if len(data) == 4 * n * vocabulary else "<f2"
    stream = _Stream(data)
    log_probs = stream.take(dtype, n * vocabulary).reshape(n, vocabulary)
    stream.end()
    return log_probs.astype(np.float32)


# ---- Parts ----


class _Stream:
    """Reads arrays from bytes, front to back."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, dtype: str, number: int) -> Any:
        size = np.dtype(dtype).itemsize * number
        if self.at + size > len(self.data):
            raise Damaged(f"{len(self.data)} bytes are too few")
        found = np.frombuffer(self.data, dtype, number, self.at)
        self.at += size
        return found

    def rest(self) -> Bytes:
        found = np.frombuffer(self.data, np.uint8, offset=self.at)
        self.at = len(self.data)
        return found

    def end(self) -> None:
        if self.at != len(self.data):
            raise Damaged(f"{len(self.data) - self.at} bytes too many")


def _quarters(n: int, k: int) -> Ints:
    """The group of each gap, (n * k,): which target, and which quarter of its list."""
    quarter = np.arange(k) * QUARTERS // k
    return (np.arange(n)[:, None] * QUARTERS + quarter).ravel()


def _rice(gaps: Ints, group: Ints, groups: int) -> list[Bytes]:
    """Parameters, low bits, and last the unary part, whose length then need not be stored."""
    parameters = best_parameters(gaps, group, groups)
    widths = parameters[group]
    low = pack(gaps & ((1 << widths) - 1), widths)
    return [pack(parameters, np.full(groups, 4)), low, pack_unary(gaps >> widths)]


def _unrice(stream: _Stream, group: Ints, groups: int) -> Ints:
    parameters = unpack(stream.take("u1", -(-groups // 2)), np.full(groups, 4))
    widths = parameters[group]
    low = unpack(stream.take("u1", -(-int(widths.sum()) // 8)), widths)
    high = unpack_unary(stream.rest(), len(group))
    if len(high) != len(low):
        raise Damaged("the ids end too early")
    return (high << widths) | low


def _normalised(log_probs: Floats, log_tail: Floats, log_label: Floats) -> Floats:
    """Scale the stored probabilities, the label's included, to one minus the tail."""
    label = np.where(np.isnan(log_label), 0.0, np.exp(np.nan_to_num(log_label)))
    left = np.maximum(-np.expm1(np.minimum(log_tail, -1e-7)) - label, 1e-30)
    named = np.maximum(np.exp(log_probs).sum(1), 1e-30)
    # Sums this far apart are no rounding: the label alone has nearly all, for one.
    factor = np.clip(np.log(left / named), -0.1, 0.1)
    return np.minimum(log_probs + factor[:, None], 0.0).astype(np.float32)
