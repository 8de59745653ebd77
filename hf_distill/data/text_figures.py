"""Length and variety of written texts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise


def repetition(ids: Sequence[int]) -> float:
    """The share of pairs of tokens that occurred before in this text, 0 to 1."""
    pairs = list(pairwise(ids))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def length_and_variety(
    texts: Sequence[Sequence[int]], finished: Sequence[bool]
) -> dict[str, float]:
    """Figures of some texts; {} without any text.

    texts: their ids; finished: for each whether it ended before the length limit
    returns: `written_tokens`: mean length; `written_cut`: share of texts without an end;
        `written_repetition`: mean share of pairs of tokens that repeat one of the same text;
        `written_distinct`: different pairs of tokens over all pairs, of all texts together
    """
    if not texts:
        return {}
    pairs = [pair for ids in texts for pair in pairwise(ids)]
    return {
        "written_tokens": statistics.fmean(map(len, texts)),
        "written_cut": statistics.fmean(not ended for ended in finished),
        "written_repetition": statistics.fmean(map(repetition, texts)),
        "written_distinct": len(set(pairs)) / len(pairs) if pairs else 1.0,
    }
