"""Tokenize rows of text, and make labels for the tokens that the loss covers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from hf_distill.data.chat import (
    Annotated,
    assistant_turns,
    completion_of,
    template,
    without_end,
)
from hf_distill.data.clean import iterate
from hf_distill.data.collect import COLUMNS
from hf_distill.data.config import DataConfig, Format
from hf_distill.data.deduplicate import column
from hf_distill.data.pack import pack
from hf_distill.data.preparation_table import PreparationTable, Step
from hf_distill.errors import InputError
from hf_distill.losses.targets import IGNORE

VERSION = 1  # part of every cache key: raise it when the same settings would give other rows
_UNLIMITED = 10**9  # tokenizers without a limit report a huge number
WHOLE, CUT, DROPPED = 0, 1, 2  # the state of a row
# Whether the target of a row ends where its text ends. Otherwise it was cut while it was generated,
# and the loss covers no end.
FINISHED = "teacher_finished"

FEATURES = {"input_ids": List(Value("int32")), "labels": List(Value("int32"))}
NOTES = {"_state": Value("uint8"), "_tokens": Value("int32"), "_targets": Value("int32")}


def tokenize_rows(
    rows: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    table: PreparationTable,
) -> tuple[DatasetDict, PreparationTable]:
    """Token ids and labels, at most ``config.max_length`` per row, packed if the config says so.

    rows, table: as ``clean_rows`` returns them; further steps are added to the table
    returns: splits with ``input_ids`` and ``labels`` (int32, unpadded; ``IGNORE`` where there is no
        target), and ``position_ids`` if packed documents must not attend to each other. Several
        sets of training rows become one split, ``train``, one set after the other
    raises: InputError if the tokenizer does not fit the rows or ``max_length``, or no row is left
    """
    splits: dict[str, Dataset] = {}
    training = [_format(part) for split, part in rows.items() if split.startswith("train")]
    for split, part in rows.items():
        name = _format(part)
        chat = name in ("chat", "chat_completion")
        check_tokenizer(tokenizer, config.max_length, chat=chat, what="data.max_length")
        annotated, step = _annotated(part, split, tokenizer, config, name)
        table = table.add(step)
        if not len(annotated):
            raise InputError(
                f"no {split} row has a target within data.max_length={config.max_length} tokens: "
                "raise it or give other rows"
            )
        if config.packing:
            # Rows of text beside rows of chats must have the same columns.
            apart = name != "text" or set(training) != {"text"}
            within = config.packing_attention == "within" or (
                config.packing_attention == "auto" and apart
            )
            annotated, step = pack(
                annotated, split, config.max_length, whole=name != "text", within=within
            )
            table = table.add(step)
        splits[split] = annotated
    sets = [split for split in splits if split.startswith("train/")]
    if sets:
        train = concatenate_datasets([splits.pop(split) for split in sets])
        splits = {"train": train, **splits}
    return DatasetDict(splits), table


def annotate(
    batch: Mapping[str, Sequence[Any]],
    tokenizer: PreTrainedTokenizerBase,
    name: Format,
    separator: str = "\n",
) -> list[Annotated]:
    """Ids and labels of every row of a batch, without any limit of length.

    The loss covers, by format:
    text: all tokens, and the end-of-text token after each document
    prompt_completion: the completion and the end-of-text token after it; the ids of the prompt
        alone are an exact prefix of the row, as in generation
    chat: the assistant's turns; see ``chat.assistant_turns``
    chat_completion: everything after the prompt and its generation prompt
    A row whose column `FINISHED` is False stops where its text does.
    raises: InputError for a chat template in whose text these cannot be found
    """
    if name == "chat_completion":
        found = [completion_of(tokenizer, row) for row in iterate(batch)]
    elif name == "chat":
        found = [assistant_turns(tokenizer, messages) for messages in batch["messages"]]
    if name in ("chat", "chat_completion"):
        return [
            one if row.get(FINISHED, True) else without_end(tokenizer, row, one)
            for one, row in zip(found, iterate(batch), strict=True)
        ]
    prefix, end = prefix_ids(tokenizer), [tokenizer.eos_token_id]
    if name == "text":
        whole = [prefix + ids + end for ids in token_ids(tokenizer, batch["text"])]
        return [(ids, list(ids)) for ids in whole]
    rows = iterate(batch)
    prompts = [row["prompt"] + glue(row["prompt"], row["completion"], separator) for row in rows]
    joint = token_ids(
        tokenizer, [prompt + row["completion"] for prompt, row in zip(prompts, rows, strict=True)]
    )
    annotated = []
    for prompt, both, row in zip(token_ids(tokenizer, prompts), joint, rows, strict=True):
        if both[: len(prompt)] != prompt:  # a token straddles the border
            both = prompt + token_ids(tokenizer, [row["completion"]])[0]
        start = len(prefix) + len(prompt)
        ids = prefix + both + (end if row.get(FINISHED, True) else [])
        annotated.append((ids, [IGNORE] * start + ids[start:]))
    return annotated


def _annotated(
    rows: Dataset, split: str, tokenizer: PreTrainedTokenizerBase, config: DataConfig, name: Format
) -> tuple[Dataset, Step]:
    settings = {"name": name, "separator": config.separator, "max_length": config.max_length}
    noted = rows.map(
        _annotate_batch,
        batched=True,
        batch_size=200,
        fn_kwargs={
            **settings,
            "tokenizer": tokenizer,
            "packing": config.packing,
            "version": VERSION,
        },
        remove_columns=rows.column_names,
        features=Features(FEATURES | NOTES),
        num_proc=config.num_proc,
        desc=f"tokenize {split}",
    )
    state = column(noted, "_state")
    keep = state != DROPPED
    step = Step(
        "tokenize",
        split,
        rows=int(keep.sum()),
        tokens=int(column(noted, "_tokens")[keep].sum()),
        targets=int(column(noted, "_targets")[keep].sum()),
        removed={"without a target within max_length": int((~keep).sum())},
        changed={
            "windows of longer rows" if name == "text" else "cut at max_length": int(
                (state == CUT).sum()
            )
        },
    )
    kept = noted if keep.all() else noted.select(np.flatnonzero(keep))
    return kept.remove_columns(list(NOTES)), step


def _annotate_batch(
    batch: Mapping[str, Sequence[Any]],
    name: Format,
    separator: str,
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
    packing: bool,
    version: int,
) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {key: [] for key in (*FEATURES, *NOTES)}
    text = name == "text"
    for row in annotate(batch, tokenizer, name, separator):
        for window in windows(row, max_length, text=text, cut=not text or not packing):
            for key, value in window.items():
                columns[key].append(value)
    return columns


def windows(row: Annotated, max_length: int, *, text: bool, cut: bool) -> list[dict[str, Any]]:
    """The rows of at most ``max_length`` tokens that one annotated row gives, with notes.

    text: long rows continue in further rows; other rows are cut at the end
    cut: False leaves long rows whole, for packing, which cuts them itself
    """
    ids, labels = row
    length = max_length if cut else max(len(ids), 1)
    found = []
    for start in range(0, max(len(ids), 1), length) if text else (0,):
        window = slice(start, start + length)
        targets = sum(label != IGNORE for label in labels[window][1:])
        state = DROPPED if not targets else CUT if len(ids) > length else WHOLE
        found.append(
            {
                "input_ids": ids[window],
                "labels": labels[window],
                "_state": state,
                "_tokens": len(ids[window]),
                "_targets": targets,
            }
        )
    return found


def _format(rows: Dataset) -> Format:
    features = rows.features
    for name, wanted in COLUMNS.items():
        if set(wanted) <= set(features):
            talks = not any(isinstance(features[column], Value) for column in wanted)
            return "chat_completion" if name == "prompt_completion" and talks else name
    raise InputError(
        f"rows with the columns {sorted(features)} cannot be tokenized: use clean_rows"
    )


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, max_length: int, *, chat: bool, what: str
) -> None:
    """InputError for a tokenizer without what the rows need, or with fewer positions.

    what: the name of the setting that gives max_length, for the message
    """
    if chat:
        template(tokenizer)
    elif tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-text token, which ends a document: set one")
    limit = tokenizer.model_max_length
    if max_length > limit and limit < _UNLIMITED:
        raise InputError(
            f"{what} is {max_length}, but the tokenizer's model takes {limit} "
            f"tokens: set {what} to at most {limit}"
        )


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, without special tokens."""
    encoded = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )
    return encoded["input_ids"]


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer puts before every text, such as ``<s>``."""
    plain = token_ids(tokenizer, ["a"])[0]
    dressed = tokenizer("a")["input_ids"]
    for start in range(len(dressed) - len(plain) + 1):
        if dressed[start : start + len(plain)] == plain:
            return dressed[:start]
    return []


def glue(prompt: str, completion: str, separator: str) -> str:
    """The separator, or "" where prompt or completion brings its own white space."""
    spaced = not prompt or prompt[-1].isspace() or completion[:1].isspace()
    return "" if spaced else separator
