"""Tokenize raw rows in Python, with the options of TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value
from transformers import PreTrainedTokenizerBase

from hf_distill.data.chat import Annotated, assistant_turns, render
from hf_distill.data.clean import iterate
from hf_distill.data.config import Format
from hf_distill.data.deduplicate import column
from hf_distill.data.forms import Form, find_form, has_target, is_list, joined_messages
from hf_distill.data.pack import pack, pack_batch
from hf_distill.data.tokenize import (
    CUT,
    DROPPED,
    FEATURES,
    NOTES,
    VERSION,
    annotate,
    check_tokenizer,
    windows,
)
from hf_distill.errors import InputError
from hf_distill.losses.targets import IGNORE

WHAT = {
    "text": "text",
    "prompt_completion": "prompt/completion",
    "chat_completion": "conversational prompt/completion",
    "chat": "messages",
}
_HEAD = 100  # rows of a stream that are read to find its columns

Rows: TypeAlias = Dataset | IterableDataset


def is_raw(rows: Rows) -> bool:
    """Whether rows are of a known raw form; False where they have ``input_ids``, or neither."""
    names = column_names(rows)
    return "input_ids" not in names and find_form(names) is not None


def tokenize_raw_rows(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    packing: bool = False,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    keep: Sequence[str] = (),
    num_proc: int | None = None,
) -> tuple[Rows, str]:
    """Token ids and labels of raw rows.

    rows: with the columns of one of ``data.FORMS``; a stream is tokenized as it is read
    max_length: most tokens of a row. Longer text continues in further rows. Other rows are cut at
        the end, and dropped if no target is left
    packing: fill rows of ``max_length`` tokens with several documents; in a stream, a thousand
        documents at a time
    completion_only_loss: loss on completions only; None means True if rows have completions
    assistant_only_loss: loss on the assistant's turns only; with conversational prompts and
        completions, on those in the completion
    keep: further columns to keep, one number per row
    num_proc: processes that tokenize a ``Dataset``
    returns: rows with ``input_ids`` and ``labels`` (and ``position_ids`` if packed documents must
        not attend to each other), and one line that reports the result
    raises: InputError for options that do not fit the rows, or a tokenizer that does not
    """
    if max_length < 2:
        raise InputError(f"max_length is {max_length}, but a target needs at least 2 tokens")
    rows = rows.with_format(None)  # cells as Python objects, whatever the user's format
    names = column_names(rows)
    if not names or (isinstance(rows, Dataset) and not len(rows)):
        raise InputError("the data set has no rows: give rows to tokenize")
    form = find_form(names)
    if form is None:
        raise InputError(f"rows with the columns {', '.join(names)} are of no known raw form")
    kept = _kept(rows, [name for name in keep if name in names], packing)
    name = _format(rows, form)
    _check_options(form, name, completion_only_loss, assistant_only_loss)
    check_tokenizer(tokenizer, max_length, chat=_is_chat(name), what="max_length")
    pairs = name in ("prompt_completion", "chat_completion")
    settings = {
        "tokenizer": tokenizer, "columns": list(form.columns), "kept": kept, "name": name,
        "max_length": max_length, "cut": name != "text" or not packing,
        "completions": pairs and completion_only_loss is not False, "turns": assistant_only_loss,
        "version": VERSION,
    }  # fmt: skip
    if isinstance(rows, IterableDataset):
        tokens, counted = _of_stream(rows, [*names, *form.optional], settings, packing), ""
    else:
        tokens, counted = _of_dataset(rows, settings, packing, num_proc)
    number = "a stream"
    if isinstance(rows, Dataset):
        number = f"{len(rows):,} row{'s' if len(rows) > 1 else ''}"
    mapping = form.described(names)
    line = f"{number} of {WHAT[name]}{f' ({mapping})' if mapping else ''} tokenized, at most "
    line += f"{max_length} tokens a row{', packed' if packing else ''}, loss on {_learnt(settings)}"
    return tokens, line + counted


def _of_dataset(
    rows: Dataset, settings: dict[str, Any], packing: bool, num_proc: int | None
) -> tuple[Dataset, str]:
    noted = rows.map(
        _tokenize_batch,
        batched=True,
        batch_size=200,
        fn_kwargs=settings,
        remove_columns=rows.column_names,
        features=Features(FEATURES | NOTES | _weights(settings)),
        num_proc=num_proc,
        desc="tokenize",
    )
    state = column(noted, "_state")
    dropped, cut = int((state == DROPPED).sum()), int((state == CUT).sum())
    tokens = noted.remove_columns(list(NOTES))
    if dropped:
        tokens = tokens.select(np.flatnonzero(state != DROPPED))
    if not len(tokens):
        raise InputError(
            f"no row has a target within {settings['max_length']} tokens: raise max_length, or "
            "check which tokens the loss covers"
        )
    whole = settings["name"] != "text"
    if packing:
        tokens, _ = pack(tokens, "rows", settings["max_length"], whole=whole, within=whole)
    counted = f"; {cut:,} {'cut' if whole else 'windows of longer rows'}" if cut else ""
    return tokens, counted + (f"; {dropped:,} without a target dropped" if dropped else "")


def _of_stream(
    rows: IterableDataset, names: list[str], settings: dict[str, Any], packing: bool
) -> IterableDataset:
    found = Features(FEATURES | _weights(settings))
    tokens = rows.map(
        _tokenize_stream,
        batched=True,
        batch_size=200,
        fn_kwargs=settings,
        remove_columns=names,
        features=found,
    ).select_columns(list(found))  # columns that only later rows have are left out
    if not packing:
        return tokens
    whole = settings["name"] != "text"
    features = dict(FEATURES) | ({"position_ids": FEATURES["labels"]} if whole else {})
    return tokens.map(
        pack_batch,
        batched=True,
        batch_size=1000,
        fn_kwargs={"max_length": settings["max_length"], "whole": whole, "within": whole},
        remove_columns=list(FEATURES),
        features=Features(features),
    )


def _tokenize_stream(batch: Mapping[str, Sequence[Any]], **settings: Any) -> dict[str, list[Any]]:
    """As `_tokenize_batch`, without rows that have no target."""
    columns = _tokenize_batch(batch, **settings)
    stays = [state != DROPPED for state in columns["_state"]]
    return {
        name: [value for value, here in zip(values, stays, strict=True) if here]
        for name, values in columns.items()
        if name not in NOTES
    }


def _tokenize_batch(
    batch: Mapping[str, Sequence[Any]],
    tokenizer: PreTrainedTokenizerBase,
    columns: list[str],
    kept: list[str],
    name: Format,
    max_length: int,
    cut: bool,
    completions: bool,
    turns: bool,
    version: int,
) -> dict[str, list[Any]]:
    form = find_form(columns)
    assert form is not None
    rows = form.read(batch, chat=_is_chat(name))
    usable = [has_target(row) for row in iterate(rows)]
    full = {key: [v for v, use in zip(rows[key], usable, strict=True) if use] for key in rows}
    annotated = iter(
        _annotated(full, tokenizer, name, form, completions, turns) if any(usable) else ()
    )
    found: dict[str, list[Any]] = {key: [] for key in (*FEATURES, *NOTES, *kept)}
    for number, use in enumerate(usable):
        one: Annotated = next(annotated) if use else ([], [])
        for part in windows(one, max_length, text=name == "text", cut=cut):
            for key, value in part.items():
                found[key].append(value)
            for key in kept:
                found[key].append(batch[key][number])
    return found


def _annotated(
    rows: Mapping[str, Sequence[Any]],
    tokenizer: PreTrainedTokenizerBase,
    name: Format,
    form: Form,
    completions: bool,
    turns: bool,
) -> list[Annotated]:
    """Ids and labels of rows that hold a target.

    completions, turns: loss on these only; with both, on their intersection; with neither, on all
        tokens
    """
    whole = [*rows["messages"]] if name == "chat" else []
    if name == "chat_completion":
        whole = [joined_messages(row) for row in iterate(rows)]
    of_turns = [assistant_turns(tokenizer, messages) for messages in whole] if turns else []
    if turns and not completions:
        return of_turns
    if whole and not completions:
        ids = [render(tokenizer, messages)["input_ids"] for messages in whole]
        return [(one, list(one)) for one in ids]
    # Prompt and completion are joined as they are; converted columns need a separator.
    found = annotate(rows, tokenizer, name, "\n" if form.convert is not None else "")
    if turns:
        return [
            (one[0], _both(one[1], other[1])) for one, other in zip(found, of_turns, strict=True)
        ]
    return found if completions else [(ids, list(ids)) for ids, _ in found]


def _both(labels: list[int], others: list[int]) -> list[int]:
    pairs = zip(labels, others, strict=True)
    return [label if other != IGNORE else IGNORE for label, other in pairs]


def _learnt(settings: dict[str, Any]) -> str:
    if settings["turns"]:
        return f"the assistant's turns{' of completions' if settings['completions'] else ''}"
    return "completions" if settings["completions"] else "all tokens"


def _check_options(
    form: Form, name: Format, completion_only: bool | None, assistant_only: bool
) -> None:
    columns = " and ".join(form.columns)
    if completion_only and form.format != "prompt_completion":
        raise InputError(
            f"completion_only_loss is True, but the rows have {columns}, not prompt and "
            "completion: leave it out"
        )
    if assistant_only and not _is_chat(name):
        raise InputError(
            f"assistant_only_loss is True, but the rows have {columns}, not messages: leave it out"
        )


def _kept(rows: Rows, names: list[str], packing: bool) -> list[str]:
    """The names, after a check that these columns can be kept."""
    if packing and names:
        raise InputError(
            f"a packed row holds several rows and cannot keep {names[0]!r}: set packing=False"
        )
    for name in names:
        dtype = getattr((rows.features or {}).get(name), "dtype", "float64")
        if not dtype.startswith(("float", "int", "uint", "bool")):
            raise InputError(f"column {name!r} holds {dtype}, but must hold a number a row")
    return names


def _weights(settings: dict[str, Any]) -> dict[str, Value]:
    return {name: Value("float64") for name in settings["kept"]}


def _is_chat(name: Format) -> bool:
    return name in ("chat", "chat_completion")


def _format(rows: Rows, form: Form) -> Format:
    """The format of the rows; ``chat_completion`` if prompts and completions are lists."""
    if form.columns != ("prompt", "completion"):
        return form.format
    first: Mapping[str, Any] = next((row for row in rows if row.get("completion") is not None), {})
    return "chat_completion" if is_list(first.get("completion")) else form.format


def column_names(rows: Rows) -> list[str]:
    """The columns; of a stream that does not know them, those of its first rows."""
    if rows.column_names is not None:
        return list(rows.column_names)
    return list({name: None for row in islice(rows, _HEAD) for name in row})
