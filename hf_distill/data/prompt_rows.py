"""Tokenize rows of prompts without completions, which the student will generate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from hf_distill.data.prompts import Prompts
from hf_distill.errors import InputError
from hf_distill.losses.targets import IGNORE

# The columns of the teacher's own prompts: text or messages, and token ids.
TEACHER_PROMPT, TEACHER_PROMPT_IDS = "teacher_prompt", "teacher_prompt_ids"


def holds_prompts(names: Sequence[str]) -> bool:
    """Whether rows with these columns hold raw prompts without completions."""
    return "prompt" in names and not {"completion", "input_ids"} & set(names)


def prompt_length(labels: Sequence[int], prompt_tokens: int) -> int:
    """How many tokens of a causal model's row are its prompt: those before the first target.

    labels: as long as the row, `IGNORE` where nothing is a target; without any the row is a prompt
    prompt_tokens: at most, in a row of plain text, which has no prompt of its own
    """
    first = next((i for i, label in enumerate(labels) if label != IGNORE), len(labels))
    return first if first > 1 else min(prompt_tokens, max(1, len(labels) - 1))


def tokenize_prompts(
    rows: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> tuple[Dataset | IterableDataset, str]:
    """Token ids of prompts: text, or messages with the template's generation prompt after them.

    rows: with `prompt`, and perhaps `teacher_prompt`, text or messages each
    max_length: most tokens of a prompt and at least one token of its completion; longer prompts are
        dropped
    returns: rows with `input_ids`, `labels` (no target) and perhaps `teacher_prompt_ids`, and one
        line that reports the result
    raises: InputError for cells that are empty, or neither text nor messages
    """
    names = rows.column_names or list(next(iter(rows), {}))
    columns = [name for name in ("prompt", TEACHER_PROMPT) if name in names]
    features = {name: List(Value("int32")) for name in ("input_ids", "labels", TEACHER_PROMPT_IDS)}
    if TEACHER_PROMPT not in columns:
        del features[TEACHER_PROMPT_IDS]
    found = rows.with_format(None).map(
        _tokenize_batch,
        batched=True,
        batch_size=200,
        fn_kwargs={"tokenizer": tokenizer, "columns": columns, "max_length": max_length},
        remove_columns=list(names),
        features=Features(features),
    )
    line = f"prompts tokenized, of at most {max_length - 1} tokens"
    if not isinstance(rows, Dataset) or not isinstance(found, Dataset):
        return found, f"a stream of {line}"
    dropped = len(rows) - len(found)
    if not len(found):
        raise InputError(
            f"no prompt is shorter than {max_length} tokens: raise max_length, or shorten them"
        )
    return found, f"{len(rows):,} {line}" + (f"; {dropped:,} longer dropped" if dropped else "")


def _tokenize_batch(
    batch: Mapping[str, Sequence[Any]],
    tokenizer: PreTrainedTokenizerBase,
    columns: list[str],
    max_length: int,
) -> dict[str, list[list[int]]]:
    encoder = Prompts(tokenizer, encoder_decoder=False)
    found: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    if TEACHER_PROMPT in columns:
        found[TEACHER_PROMPT_IDS] = []
    for cells in zip(*(batch[name] for name in columns), strict=True):
        ids = [encoder.encode(cell)[0] for cell in cells]
        if max(map(len, ids)) >= max_length:
            continue
        found["input_ids"].append(ids[0])
        found["labels"].append([IGNORE] * len(ids[0]))
        for more in ids[1:]:
            found[TEACHER_PROMPT_IDS].append(more)
    return found
