"""A WordPiece tokenizer for the tiny models of `task_models`, and raw rows of every task."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from transformers import BertTokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PIECES = (
    "the", "cat", "dog", "fox", "sat", "slept", "ran", "on", "who", "mat", "bed", "red", "##s",
    "##ting", ";", "?", ".", "and",
)  # fmt: skip
CLASSES = ("ant", "bee", "cow", "doe", "eel")

RAW: dict[str, list[dict[str, Any]]] = {
    "seq2seq-lm": [
        {"document": "the dog and the fox " * (1 + n % 3), "summary": "a dog " * (1 + n % 2)}
        for n in range(6)
    ],
    "masked-lm": [{"text": "the cats sat on the red mat . " * (1 + n % 3)} for n in range(6)],
    "sequence-classification": [
        {"text": "the cat sat . " * (1 + n % 3), "label": n % 5} for n in range(6)
    ],
    "token-classification": [
        {
            "tokens": ["cats", "sat", "on", "beds"][: 2 + n % 3],
            "tags": [n % 5, 1, 2, 0][: 2 + n % 3],
        }
        for n in range(6)
    ],
    "question-answering": [
        {
            "question": ("who sat ?", "who slept on the red bed ?", "the fox ?")[n % 3],
            "context": "the cats sat on the red mat ; the dog slept on the bed ; " * (1 + n % 2),
            "answers": {"text": ["cats"][: min(n, 1)], "answer_start": [4][: min(n, 1)]},
        }
        for n in range(6)
    ],
}  # fmt: skip


@lru_cache
def word_pieces(**options: Any) -> Any:
    """23 tokens, [PAD] is 0, [CLS] and [SEP] around a text, at most 40 tokens."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *PIECES))}
    return BertTokenizer(vocab=vocabulary, **({"model_max_length": 40} | options))
