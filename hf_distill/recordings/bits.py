"""Pack integers into few bits with numpy, many at a time, without a loop over values.

Bits are filled from the most significant one. The Rice code of a gap g with parameter r is g >> r
in unary (that many zeros and a one), then the r low bits. The two parts go into separate streams,
so that a few array operations decode them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]

WIDEST = 25  # bits of one field: what a 32-bit window holds wherever in a byte it begins
PARAMETERS = 16  # Rice parameters 0 to 15, in four bits


def pack(values: Ints, widths: Ints) -> Bytes:
    """Fields of the given widths, one after the other; values (n,), widths (n,) up to `WIDEST`."""
    starts = np.cumsum(widths) - widths
    total = int(widths.sum())
    place = np.arange(total) - np.repeat(starts, widths)
    shift = np.repeat(widths - 1, widths) - place
    return np.packbits(((np.repeat(values, widths) >> shift) & 1).astype(np.uint8))


def unpack(data: Bytes, widths: Ints) -> Ints:
    """The values that `pack` was given, from its bytes and the same widths."""
    if len(widths) == 0:
        return np.empty(0, np.int64)
    starts = np.cumsum(widths) - widths
    padded = np.concatenate([data, np.zeros(4, np.uint8)]).astype(np.uint32)
    windows = padded[:-3] << 24 | padded[1:-2] << 16 | padded[2:-1] << 8 | padded[3:]
    found = windows[starts >> 3].astype(np.int64) >> (32 - (starts & 7) - widths)
    return found & ((1 << widths) - 1)


def pack_unary(values: Ints) -> Bytes:
    """Encode each value as that many zeros and a one."""
    ends = np.cumsum(values + 1)
    bits = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    bits[ends - 1] = 1
    return np.packbits(bits)


def unpack_unary(data: Bytes, number: int) -> Ints:
    """The first `number` values of `pack_unary`; fewer if the data end before."""
    ends = np.flatnonzero(np.unpackbits(data))[:number]
    return np.diff(ends, prepend=-1) - 1


def best_parameters(gaps: Ints, group: Ints, groups: int) -> Ints:
    """The Rice parameter that gives each group of gaps the fewest bits, (groups,).

    gaps, group: (n,), the gap and the number of the group that it is in
    """
    best = np.zeros(groups, np.int64)
    size = np.bincount(group, minlength=groups)
    least = np.full(groups, np.inf)
    for parameter in range(PARAMETERS):
        quotients = np.bincount(group, weights=gaps >> parameter, minlength=groups)
        cost = quotients + size * (1 + parameter)
        best[cost < least] = parameter
        least = np.minimum(cost, least)
    return best


class Damaged(ValueError):
    """The bytes are not what an encoder wrote."""


class Stream:
    """Reads arrays from bytes, front to back. raises: Damaged, where they end too early"""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    @property
    def size(self) -> int:
        """The bytes that are left."""
        return len(self.data) - self.at

    def take(self, dtype: str, number: int) -> Any:
        """The next values."""
        if np.dtype(dtype).itemsize * number > self.size:
            raise Damaged(f"{len(self.data)} bytes are too few")
        found = np.frombuffer(self.data, dtype, number, self.at)
        self.at += found.nbytes
        return found

    def end(self) -> None:
        """Check that nothing is left."""
        if self.size:
            raise Damaged(f"{self.size} bytes too many")


def rice(gaps: Ints, widths: Ints) -> list[Bytes]:
    """Rice codes: low bits and unary part. gaps, widths: (n,), the latter the Rice parameters"""
    return [pack(gaps & ((1 << widths) - 1), widths), pack_unary(gaps >> widths)]


def unrice(stream: Stream, widths: Ints, unary: int | None = None) -> Ints:
    """The gaps that `rice` was given. unary: bytes of the unary part, by default all that follow"""
    low = unpack(stream.take("u1", -(-int(widths.sum()) // 8)), widths)
    data = stream.take("u1", stream.size if unary is None else unary)
    high = unpack_unary(data, len(widths))
    if len(high) != len(low):
        raise Damaged("the ids end too early")
    return (high << widths) | low
