"""Tokenize raw rows in Python, with the options that TRL's SFTTrainer has for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value
from transformers import PreTrainedTokenizerBase

from hf_distill.data.clean import iterate
from hf_distill.data.deduplicate import column
from hf_distill.data.forms import Form, find_form, is_conversation, joined_messages
from hf_distill.data.pack import pack, pack_batch
from hf_distill.data.tokenize import (
    CUT,
    DROPPED,
    FEATURES,
    NOTES,
    VERSION,
    Annotated,
    annotate,
    check_tokenizer,
    render,
    windows,
)
from hf_distill.errors import InputError
from hf_distill.losses.targets import IGNORE

WHAT = {"text": "text", "prompt_completion": "prompt/completion", "chat": "messages"}


def is_raw(rows: Dataset | IterableDataset) -> bool:
    """Whether rows are of a known raw form; False where they have ``input_ids``, or neither."""
    names = _names(rows)
    return "input_ids" not in names and find_form(names) is not None


def tokenize_raw_rows(
    rows: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    packing: bool = False,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    keep: Sequence[str] = (),
) -> tuple[Dataset | IterableDataset, str]:
    """Token ids and labels of raw rows.

    rows: with the columns of one of ``data.forms.FORMS``; a stream is tokenized as it is read
    max_length: tokens of a row, at most. Longer text goes on in further rows; other rows are cut at
        the end, and dropped if that leaves nothing to learn
    packing: fill rows of ``max_length`` tokens with several documents; of a stream, a thousand
        documents at a time
    completion_only_loss: learn completions only; None for True where rows have completions
    assistant_only_loss: learn the assistant's turns of messages only
    keep: further columns to carry along, one number a row
    returns: rows with ``input_ids`` and ``labels`` (and ``position_ids`` where packed documents
        must not see each other), and one line that says what was done
    raises: InputError for options that do not fit the rows, or a tokenizer that does not
    """
    names = _names(rows)
    form = find_form(names)
    if form is None:
        raise InputError(f"rows with the columns {', '.join(names)} are of no known raw form")
    kept = [name for name in keep if name in names]
    if packing and kept:
        raise InputError(
            f"packing puts several rows into one, which cannot keep {kept[0]!r}: set packing=False"
        )
    talks = _is_conversational(rows, form)
    _check_options(form, completion_only_loss, assistant_only_loss, talks)
    check_tokenizer(tokenizer, max_length, chat=talks, what="max_length")
    learn = "all"
    if form.format == "prompt_completion" and completion_only_loss is not False:
        learn = "completions"
    elif assistant_only_loss:
        learn = "the assistant's turns"
    whole = form.format != "text"
    settings = {
        "tokenizer": tokenizer, "columns": form.present(names), "kept": kept,
        "max_length": max_length, "learn": learn, "cut": whole or not packing, "version": VERSION,
    }  # fmt: skip
    if isinstance(rows, IterableDataset):
        tokens, counted = _of_stream(rows, settings, packing, whole), ""
    else:
        tokens, counted = _of_dataset(rows, settings, packing, whole)
    number = f"{len(rows):,} rows" if isinstance(rows, Dataset) else "a stream"
    mapping = f" ({form.mapping})" if form.mapping else ""
    line = f"{number} of {WHAT[form.format]}{mapping} tokenized, at most {max_length} tokens a row"
    line += ", packed" if packing else ""
    return tokens, f"{line}, loss on {'all tokens' if learn == 'all' else learn}{counted}"


def _of_dataset(
    rows: Dataset, settings: dict[str, Any], packing: bool, whole: bool
) -> tuple[Dataset, str]:
    kept = {name: rows.features[name] for name in settings["kept"]}
    noted = rows.map(
        _tokenize_batch,
        batched=True,
        batch_size=200,
        fn_kwargs=settings,
        remove_columns=rows.column_names,
        features=Features(FEATURES | NOTES | kept),
        desc="tokenize",
    )
    state = column(noted, "_state") if len(noted) else np.zeros(0)
    dropped, cut = int((state == DROPPED).sum()), int((state == CUT).sum())
    tokens = noted.remove_columns(list(NOTES))
    if dropped:
        tokens = tokens.select(np.flatnonzero(state != DROPPED))
    if not len(tokens):
        raise InputError(
            f"no row has anything to learn within {settings['max_length']} tokens: raise "
            "max_length, or check which tokens the loss is on"
        )
    if packing:
        tokens, _ = pack(tokens, "rows", settings["max_length"], whole=whole, within=whole)
    counted = f"; {cut:,} {'cut' if whole else 'windows of longer rows'}" if cut else ""
    return tokens, counted + (f"; {dropped:,} without a target dropped" if dropped else "")


def _of_stream(
    rows: IterableDataset, settings: dict[str, Any], packing: bool, whole: bool
) -> IterableDataset:
    kept = {name: Value("float64") for name in settings["kept"]}
    names = _names(rows)
    tokens = rows.map(
        _tokenize_stream,
        batched=True,
        batch_size=200,
        fn_kwargs=settings,
        remove_columns=names,
        features=Features(FEATURES | kept),
    )
    if not packing:
        return tokens
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
    """As `_tokenize_batch`, without rows that have nothing to learn."""
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
    max_length: int,
    learn: str,
    cut: bool,
    version: int,
) -> dict[str, list[Any]]:
    form = find_form(columns)
    assert form is not None
    given = {name: batch[name] for name in columns}
    rows = given if form.convert is None else form.convert(given)
    annotated = _annotated(rows, form, tokenizer, learn)
    found: dict[str, list[Any]] = {name: [] for name in (*FEATURES, *NOTES, *kept)}
    for number, one in enumerate(annotated):
        parts = windows(one, max_length, text=form.format == "text", cut=cut)
        for part in parts:
            for name, value in part.items():
                found[name].append(value)
            for name in kept:
                found[name].append(batch[name][number])
    return found


def _annotated(
    rows: Mapping[str, Sequence[Any]], form: Form, tokenizer: PreTrainedTokenizerBase, learn: str
) -> list[Annotated]:
    if form.format == "prompt_completion" and _talks(rows):
        return [_completed(tokenizer, row, learn) for row in iterate(rows)]
    if form.format == "chat" and learn == "all":
        whole = [render(tokenizer, messages)["input_ids"] for messages in rows["messages"]]
        return [(ids, list(ids)) for ids in whole]
    # Prompt and completion stand as they are; what was converted needs a border between them.
    separator = "\n" if form.convert is not None else ""
    found = annotate(rows, tokenizer, form.format, separator)
    return [(ids, list(ids)) for ids, _ in found] if learn == "all" else found


def _completed(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], learn: str) -> Annotated:
    """A conversational prompt with its completion, rendered as one conversation."""
    (messages,) = joined_messages({name: [value] for name, value in row.items()})["messages"]
    ids = render(tokenizer, messages)["input_ids"]
    if learn == "all":
        return ids, list(ids)
    prompt = render(tokenizer, list(row["prompt"]), add_generation_prompt=True)["input_ids"]
    if ids[: len(prompt)] != prompt:
        raise InputError(
            "the chat template renders a prompt in another way when a completion follows, so that "
            "the completion's tokens cannot be found: use a template that only appends, or "
            "completion_only_loss=False"
        )
    return ids, [IGNORE] * len(prompt) + ids[len(prompt) :]


def _check_options(
    form: Form, completion_only: bool | None, assistant_only: bool, talks: bool
) -> None:
    if completion_only and form.format != "prompt_completion":
        raise InputError(
            f"completion_only_loss is True, but the rows have {' and '.join(form.columns)}, not "
            "prompt and completion: leave it out"
        )
    if assistant_only and form.format != "chat":
        kind = "conversational prompts and completions" if talks else " and ".join(form.columns)
        raise InputError(
            f"assistant_only_loss is True, but the rows have {kind}, not messages: leave it out"
        )


def _is_conversational(rows: Dataset | IterableDataset, form: Form) -> bool:
    if form.format == "chat":
        return True
    first = next(iter(rows), None)
    if form.columns != ("prompt", "completion") or first is None:
        return False
    return is_conversation(first["prompt"])


def _talks(rows: Mapping[str, Sequence[Any]]) -> bool:
    return bool(rows["prompt"]) and is_conversation(rows["prompt"][0])


def _names(rows: Dataset | IterableDataset) -> list[str]:
    """The columns; of a stream that does not know them, those of its first row."""
    if rows.column_names is not None:
        return list(rows.column_names)
    return list(next(iter(rows), {}))
