"""Encode a teacher's outputs at the targets of one row in few bytes, and decode them.

There are three kinds, each with its own `encode` and `decode` for all arrays of a row.

top_k   The k most likely ids in ascending order (`recordings.id_lists`). The `EXACT` largest
        log-probabilities in float16; the others as one of 31 levels, evenly spaced between the
        smallest exact one and the smallest of all. The log of the tail's probability in float16.
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
    Damaged,
    Ints,
    Stream,
    pack,
    pack_unary,
    unpack,
    unpack_unary,
)
from hf_distill.recordings.id_lists import decode_lists, encode_lists

Floats = NDArray[np.float32]

VERSION = 2
KINDS = ("top_k", "sampled", "full")
EXACT = 8
BITS = 5  # of a level; the highest one marks a value that is stored exactly
MARK = 2**BITS - 1
LEAST = -1e4  # smaller log-probabilities are raised to this float16 number; its probability is 0
LEAST_TAIL = -80.0
RANGE = (
    24.0  # most nats that the levels span, so that an id of probability 0 does not make them coarse
)


@dataclass(frozen=True)
class TopK:
    """ids: (targets, k) int64, ascending; log_probs: (targets, k) float32
    log_tail: (targets,) float32, of the mass that no id of these has
    log_label: (targets,) float32, NaN where the label is among the ids or beyond the vocabulary
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
    parts: list[Any] = [np.maximum(content.log_tail, LEAST_TAIL).astype("<f2")]
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
    parts += encode_lists(content.ids.ravel(), np.full(n, k))
    return b"".join(part.tobytes() for part in parts)


def decode_top_k(data: bytes, n: int, k: int, vocabulary: int) -> TopK:
    """The n targets that `encode_top_k` wrote. raises: Damaged"""
    stream = Stream(data)
    log_tail = stream.take("<f2", n).astype(np.float32)
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
    ids = decode_lists(stream, np.full(n, k), vocabulary).reshape(n, k)
    return TopK(ids, _normalised(log_probs, log_tail, log_label), log_tail, log_label)


def encode_sampled(content: Sampled) -> bytes:
    """The bytes of `sampled`: gaps between sorted ids, and how often each was drawn."""
    drawn = content.counts > 0
    lengths = drawn.sum(1)
    counts = pack_unary(content.counts[drawn] - 1)
    parts: list[Any] = [lengths.astype("<u2"), content.entropy.astype("<f4")]
    parts += [np.array([len(counts)], "<u4"), counts, *encode_lists(content.ids[drawn], lengths)]
    return b"".join(part.tobytes() for part in parts)


def decode_sampled(data: bytes, n: int, vocabulary: int) -> Sampled:
    """The n targets that `encode_sampled` wrote. raises: Damaged"""
    stream = Stream(data)
    if n == 0 and not data:  # a row without a target
        return Sampled(np.zeros((0, 0), np.int64), np.zeros((0, 0), np.int64), np.zeros(0, "<f4"))
    lengths = stream.take("<u2", n).astype(np.int64)
    entropy = stream.take("<f4", n)
    (size,) = stream.take("<u4", 1)
    counts = unpack_unary(stream.take("u1", int(size)), int(lengths.sum())) + 1
    named = decode_lists(stream, lengths, vocabulary)
    if len(counts) != len(named):
        raise Damaged("there are not as many counts as ids")
    drawn = np.arange(lengths.max(initial=0))[None] < lengths[:, None]
    ids = np.full(drawn.shape, -1, np.int64)
    all_counts = np.zeros(drawn.shape, np.int64)
    ids[drawn], all_counts[drawn] = named, counts
    return Sampled(ids, all_counts, entropy)


def encode_full(log_probs: Floats) -> bytes:
    """The bytes of `full`: (targets, ids) as they are, float32 or float16."""
    return log_probs.tobytes()


def decode_full(data: bytes, n: int, vocabulary: int) -> Floats:
    """(targets, ids) float32. The size tells whether float32 or float16 was written."""
    dtype = "<f4" if len(data) == 4 * n * vocabulary else "<f2"
    stream = Stream(data)
    log_probs = stream.take(dtype, n * vocabulary).reshape(n, vocabulary)
    stream.end()
    return log_probs.astype(np.float32)


# ---- Parts ----


def _normalised(log_probs: Floats, log_tail: Floats, log_label: Floats) -> Floats:
    """Scale the stored probabilities, the label's included, to one minus the tail."""
    label = np.where(np.isnan(log_label), 0.0, np.exp(np.nan_to_num(log_label)))
    left = np.maximum(-np.expm1(np.minimum(log_tail, -1e-7)) - label, 1e-30)
    named = np.maximum(np.exp(log_probs).sum(1), 1e-30)
    # So large a difference is not rounding, for example if the label alone has nearly all mass.
    factor = np.clip(np.log(left / named), -0.1, 0.1)
    return np.minimum(log_probs + factor[:, None], 0.0).astype(np.float32)
