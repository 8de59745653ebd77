"""Repair the text of each row, decide whether the row stays, and compute its hashes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ftfy
import numpy as np
from datasets import Dataset, Features, List, Value

from hf_distill.data import hashing
from hf_distill.data.collect import COLUMNS, FEATURES
from hf_distill.data.config import CleanConfig, Format
from hf_distill.data.forms import joined_messages

VERSION = 1  # part of every cache key: raise it when the same settings would give other rows

BLANK = "blank"
UNTAUGHT = "nothing to learn"  # no completion, no assistant's turn
SHORT = "too short"
LONG = "too long"
LINES = "repeated lines"
NGRAMS = "repeated n-grams"
REASONS = ("", BLANK, UNTAUGHT, SHORT, LONG, LINES, NGRAMS)
CHANGES = {"_repaired": "Unicode repaired", "_stripped": "control characters removed"}

# Options that would change correct text are off: curly quotes, ligatures, full width, HTML entities
# and decomposed accents occur on purpose, above all in source code.
_FTFY = ftfy.TextFixerConfig(
    unescape_html=False,
    remove_terminal_escapes=False,
    replace_lossy_sequences=False,
    fix_latin_ligatures=False,
    fix_character_width=False,
    uncurl_quotes=False,
    fix_line_breaks=False,
    remove_control_chars=False,
    normalization=None,
    explain=False,
)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufff9-\ufffb]")

_NOTES = {
    "_reason": Value("uint8"),
    "_characters": Value("int64"),
    "_hash": Value("uint64"),
    "_learnt": Value("uint64"),
    "_repaired": Value("bool"),
    "_stripped": Value("bool"),
    "_signature": List(Value("uint32"), length=hashing.PERMUTATIONS),
}

Row = Mapping[str, Any]


def examine(
    rows: Dataset, name: Format, clean: CleanConfig, split: str, num_proc: int | None
) -> Dataset:
    """The rows with repaired text, and columns with facts about each.

    ``_reason``: index into ``REASONS``, 0 for a row that may stay
    ``_characters``, ``_hash`` (whole text), ``_learnt`` (hash of the targets' text, 0 for text),
    ``_repaired``, ``_stripped``, ``_signature`` (MinHash; zeros where it is not needed)
    """
    features = Features({column: rows.features[column] for column in rows.column_names} | _NOTES)
    features |= dict.fromkeys(COLUMNS[name], FEATURES[name])
    return rows.map(
        _examine_batch,
        batched=True,
        batch_size=200,
        fn_kwargs={"name": name, "clean": clean.model_dump(), "version": VERSION},
        features=features,
        num_proc=num_proc,
        desc=f"clean {split}",
    )


def row_text(row: Row, name: Format) -> str:
    """All text of a row, for counting and comparing."""
    if name == "text":
        return row["text"]
    if name == "prompt_completion":
        return f"{row['prompt']}\n{row['completion']}"
    messages = row["messages"] if name == "chat" else joined_messages(row)
    return "\n".join(message["content"] for message in messages)


def learnt_text(row: Row, name: Format) -> str:
    """The text of the targets: the completion, or the assistant's turns."""
    if name == "prompt_completion":
        return row["completion"]
    if name == "chat_completion":
        return "\n".join(turn["content"] for turn in row["completion"])
    turns = (turn["content"] for turn in row["messages"] if turn["role"] == "assistant")
    return "\n".join(turns)


def iterate(batch: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The rows of a batch of columns."""
    columns = list(batch)
    return [dict(zip(columns, row, strict=True)) for row in zip(*batch.values(), strict=True)]


def _examine_batch(
    batch: Mapping[str, Sequence[Any]], name: Format, clean: dict[str, Any], version: int
) -> dict[str, Any]:
    settings = CleanConfig(**clean)
    columns: dict[str, list[Any]] = {column: [] for column in [*batch, *_NOTES]}
    for row in iterate(batch):
        for column, value in _examine_row(row, name, settings).items():
            columns[column].append(value)
    # As numpy arrays, since Arrow takes Python integers as signed.
    return columns | {
        "_hash": np.array(columns["_hash"], dtype=np.uint64),
        "_learnt": np.array(columns["_learnt"], dtype=np.uint64),
        "_signature": np.array(columns["_signature"], dtype=np.uint32),
    }


def _examine_row(row: Row, name: Format, clean: CleanConfig) -> dict[str, Any]:
    done: set[str] = set()

    def repair(text: str | None) -> str:
        return _repair(text or "", clean, done.add)

    fixed: dict[str, Any]
    if name in ("chat", "chat_completion"):
        fixed = {
            column: [
                {"role": turn["role"] or "", "content": repair(turn["content"])}
                for turn in row[column] or []
            ]
            for column in COLUMNS[name]
        }
    else:
        fixed = {column: repair(value) for column, value in row.items()}
    text = row_text(fixed, name)
    words = hashing.word_hashes(text)
    untaught = name != "text" and not learnt_text(fixed, name).strip()
    reason = UNTAUGHT if untaught and text.strip() else _reason(text, words, clean)
    identity = hashing.text_hash(text if name == "text" else repr(list(fixed.values())))
    compared = clean.near_duplicates is not None or clean.eval_overlap is not None
    signature = (
        hashing.signature(words, identity)
        if compared and not reason
        else np.zeros(hashing.PERMUTATIONS, dtype=np.uint32)
    )
    notes = {
        "_reason": REASONS.index(reason),
        "_characters": len(text),
        "_hash": identity,
        "_learnt": 0 if name == "text" else _learnt(fixed, name),
        "_repaired": "_repaired" in done,
        "_stripped": "_stripped" in done,
        "_signature": signature,
    }
    return fixed | notes


def _learnt(row: Row, name: Format) -> int:
    return hashing.text_hash(" ".join(learnt_text(row, name).lower().split()))


def _repair(text: str, clean: CleanConfig, note: Callable[[str], None]) -> str:
    """The repaired text; ``note`` is called with the column name of each kind of change."""
    if clean.repair_unicode and not text.isascii():
        repaired = ftfy.fix_text(text, _FTFY)
        if repaired != text:
            note("_repaired")
            text = repaired
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if clean.strip_control_characters:
        stripped = _CONTROL.sub("", text)
        if stripped != text:
            note("_stripped")
            text = stripped
    return text


def _reason(text: str, words: hashing.Hashes, clean: CleanConfig) -> str:
    if not text.strip():
        return BLANK
    if len(text) < clean.min_characters:
        return SHORT
    if clean.max_characters is not None and len(text) > clean.max_characters:
        return LONG
    if clean.max_repeated_lines is not None and _repeated_lines(text) > clean.max_repeated_lines:
        return LINES
    if clean.max_top_ngram is not None and hashing.top_ngram_share(words) > clean.max_top_ngram:
        return NGRAMS
    return ""


def _repeated_lines(text: str) -> float:
    """The share of the non-blank lines that are equal to an earlier one."""
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0
