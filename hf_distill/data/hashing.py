"""Hashes of texts: of the whole text, of word sequences, and MinHash signatures.

Nothing here depends on Python's randomised ``hash``, so the numbers are the same in every process.
"""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np
import xxhash
from datasketch import MinHash
from numpy.typing import NDArray

SHINGLE_WORDS = 5
PERMUTATIONS = 64
_WORD = re.compile(r"\w+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplication modulo 2^64 is invertible
_FEWEST_WORDS = 50  # shorter rows repeat sequences by chance
_CHUNK = 1 << 14  # n-grams hashed by all permutations at a time, in 4 MB
_EMPTY = MinHash(num_perm=PERMUTATIONS, seed=1, scheme="affine32", hashfunc=int)

Hashes = NDArray[np.uint64]


def text_hash(text: str) -> int:
    """64-bit hash of the text as it is."""
    return xxhash.xxh3_64_intdigest(text.encode())


@lru_cache(maxsize=1 << 17)
def _word_hash(word: str) -> int:
    return xxhash.xxh3_64_intdigest(word.encode())


def word_hashes(text: str) -> Hashes:
    """(words,) hashes of the text's words (letters, digits, ``_``) in lower case, in order."""
    return np.fromiter(map(_word_hash, _WORD.findall(text.lower())), dtype=np.uint64)


def ngram_hashes(words: Hashes, n: int) -> Hashes:
    """(words - n + 1,) hashes of each sequence of n words; one hash if there are fewer words."""
    if not len(words):
        return words
    n = min(n, len(words))
    count = len(words) - n + 1
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(n):
        hashes = hashes * _MULTIPLIER + words[offset : offset + count]
    return mix(hashes)


def mix(hashes: Hashes) -> Hashes:
    """A bijection that spreads every bit over all others (the finaliser of splitmix64)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


def signature(words: Hashes, fallback: int) -> NDArray[np.uint32]:
    """(PERMUTATIONS,) MinHash of the set of word sequences of a row.

    words: of the row; fallback: the hash used for a row without words
    The share of equal entries of two signatures estimates the Jaccard similarity of their sets,
    with a standard error of at most 1 / (2 * sqrt(PERMUTATIONS)) = 0.06.
    """
    shingles = ngram_hashes(words, SHINGLE_WORDS)
    if not len(shingles):
        shingles = np.array([fallback], dtype=np.uint64)
    minhash = _EMPTY.copy()
    for start in range(0, len(shingles), _CHUNK):
        minhash.update_batch((shingles[start : start + _CHUNK] >> np.uint64(32)).tolist())
    return minhash.hashvalues


def top_ngram_share(words: Hashes, n: int = 4) -> float:
    """The share of the words that the most frequent sequence of n words covers.

    0 if no sequence recurs, and for rows that are too short to tell.
    """
    if len(words) < _FEWEST_WORDS:
        return 0.0
    _, counts = np.unique(ngram_hashes(words, n), return_counts=True)
    highest = int(counts.max())
    # Overlapping occurrences ("a a a a a") must not cover more words than there are.
    return min(1.0, highest * n / len(words)) if highest > 1 else 0.0
