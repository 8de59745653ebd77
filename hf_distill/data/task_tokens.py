"""Tokenize the rows of other tasks, as `data.task_rows` reads them.

Each function returns rows of token ids, without padding, and one line that reports the result.
`labels` have the form that transformers' models take; `IGNORE` (-100) marks tokens without a label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from hf_distill.data.deduplicate import column
from hf_distill.data.labels import Labels
from hf_distill.data.prompts import for_languages
from hf_distill.data.tokenize import check_tokenizer
from hf_distill.errors import InputError
from hf_distill.losses.targets import IGNORE

VERSION = 1  # part of every cache key: raise it when the same settings would give other rows
_IDS = List(Value("int32"))
_SEGMENTS = "token_type_ids"  # of BERT and its relatives: which of two texts a token is in

Batch = Mapping[str, Sequence[Any]]
Columns = dict[str, list[Any]]


def tokenize_source_target(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_source_length: int,
    max_target_length: int,
    prefix: str = "",
    source_lang: str | None = None,
    target_lang: str | None = None,
    num_proc: int | None = None,
) -> tuple[Dataset, str]:
    """Rows of `source` and `target` for an encoder-decoder: `input_ids` and `labels`.

    max_source_length, max_target_length: tokens, special ones included; the end of a longer text is
        left out and counted
    prefix: put before each source; source_lang, target_lang: see `prompts.for_languages`
    """
    check_tokenizer(tokenizer, max_source_length, chat=False, what="max_source_length")
    check_tokenizer(tokenizer, max_target_length, chat=False, what="max_target_length")
    marked, _ = for_languages(tokenizer, source_lang, target_lang)
    settings = {
        "tokenizer": marked,
        "prefix": prefix,
        "limits": (max_source_length, max_target_length),
    }
    notes = {"_source": Value("int32"), "_target": Value("int32")}
    features = {"input_ids": _IDS, "labels": _IDS} | notes
    found = _mapped(rows, _source_target, settings, features, num_proc)
    cut = {
        f"sources cut at {max_source_length} tokens": column(found, "_source") > max_source_length,
        f"targets cut at {max_target_length} tokens": column(found, "_target") > max_target_length,
    }
    return found.remove_columns(list(notes)), _line(rows, cut)


def _source_target(
    batch: Batch,
    tokenizer: PreTrainedTokenizerBase,
    prefix: str,
    limits: tuple[int, int],
    version: int,
) -> Columns:
    sources = [prefix + text for text in batch["source"]]
    targets = list(batch["target"])
    whole = tokenizer(sources, text_target=targets, verbose=False)
    cut_sources = tokenizer(sources, truncation=True, max_length=limits[0])["input_ids"]
    cut = tokenizer(text_target=targets, truncation=True, max_length=limits[1])
    return {
        "input_ids": cut_sources,
        "labels": cut["input_ids"],
        "_source": [len(ids) for ids in whole["input_ids"]],
        "_target": [len(ids) for ids in whole["labels"]],
    }


def tokenize_labelled(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    num_proc: int | None = None,
) -> tuple[Dataset, str]:
    """Rows of `text`, perhaps `pair`, and `label`: `input_ids` and `labels`.

    max_length: tokens, special ones included. Of a pair the longer text is cut first.
    """
    _check_length(tokenizer, max_length)
    features: dict[str, Any] = {"input_ids": _IDS, "labels": rows.features["label"]}
    features |= _segments(tokenizer) | {"_tokens": Value("int32")}
    settings = {"tokenizer": tokenizer, "max_length": max_length}
    found = _mapped(rows, _labelled, settings, features, num_proc)
    cut = {f"cut at {max_length} tokens": column(found, "_tokens") > max_length}
    return found.remove_columns("_tokens"), _line(rows, cut)


def _labelled(
    batch: Batch, tokenizer: PreTrainedTokenizerBase, max_length: int, version: int
) -> Columns:
    texts = [list(batch[name]) for name in ("text", "pair") if name in batch]
    whole = tokenizer(*texts, verbose=False)["input_ids"]
    found = dict(tokenizer(*texts, truncation=True, max_length=max_length))
    found.pop("attention_mask", None)
    return {**found, "labels": list(batch["label"]), "_tokens": [len(ids) for ids in whole]}


def tokenize_tagged(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    num_proc: int | None = None,
) -> tuple[Dataset, str]:
    """Rows of `tokens` and `tags`: `input_ids` and `labels`, one for each piece of a token.

    The first piece of a token has its tag, further ones and special tokens have `IGNORE`.
    """
    _check_length(tokenizer, max_length)
    _check_fast(tokenizer, "the pieces of a token")
    features = {"input_ids": _IDS, "labels": _IDS, "_lost": Value("int32")} | _segments(tokenizer)
    settings = {"tokenizer": tokenizer, "max_length": max_length}
    found = _mapped(rows, _tagged, settings, features, num_proc)
    lost = column(found, "_lost")
    line = _line(rows, {f"without all of their tags within {max_length} tokens": lost > 0})
    return found.remove_columns("_lost"), line


def _tagged(
    batch: Batch, tokenizer: PreTrainedTokenizerBase, max_length: int, version: int
) -> Columns:
    encoded = tokenizer(
        list(batch["tokens"]), is_split_into_words=True, truncation=True, max_length=max_length
    )
    labels, lost = [], []
    for number, tags in enumerate(batch["tags"]):
        words = encoded.word_ids(number)
        before = [None, *words[:-1]]
        first = [w is not None and w != b for w, b in zip(words, before, strict=True)]
        labels.append([tags[w] if here else IGNORE for w, here in zip(words, first, strict=True)])
        lost.append(len(tags) - sum(first))
    found = {k: v for k, v in encoded.items() if k != "attention_mask"}
    return {**found, "labels": labels, "_lost": lost}


# ---- Questions ----


def tokenize_questions(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 384,
    stride: int = 128,
    num_proc: int | None = None,
) -> tuple[Dataset, str]:
    """Windows of question and context: `input_ids`, `start_positions`, `end_positions`, ...

    A context that does not fit continues in further windows. Each window repeats `stride` tokens
    of the previous one.

    returns: one row per window with
        `start_positions`, `end_positions`: the first and last token of the first answer; the
            position of the CLS token (0 without one) if the answer is not wholly in the window or
            does not exist
        `answer_mask`: 1 for each token that can be part of an answer (the context's and CLS), else
            0
        `offsets`: first and last + 1 character of each of the context's tokens, [-1, -1] for others
        `row`: the index of the window's row
    raises: InputError for a question that leaves no tokens for the context
    """
    _check_length(tokenizer, max_length)
    _check_fast(tokenizer, "the characters of a token")
    if not 0 <= stride < max_length:
        raise InputError(f"stride is {stride}, but must be 0 to {max_length - 1}, below max_length")
    number = Value("int32")
    features = {"input_ids": _IDS, "start_positions": number, "end_positions": number}
    features |= {"answer_mask": List(Value("int8")), "offsets": List(List(number)), "row": number}
    features |= _segments(tokenizer)
    settings = {"tokenizer": tokenizer, "max_length": max_length, "stride": stride}
    numbered = rows.add_column("_row", np.arange(len(rows)))
    found = _mapped(numbered, _questions, settings, features, num_proc)
    windows = np.bincount(column(found, "row"), minlength=len(rows))
    line = _line(rows, {f"with more than one window of {max_length} tokens": windows > 1})
    return found, line


def _questions(
    batch: Batch,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    stride: int,
    version: int,
) -> Columns:
    _check_questions(batch, tokenizer, max_length, stride)
    encoded = tokenizer(
        list(batch["question"]),
        list(batch["context"]),
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    names = ("input_ids", *_segments(tokenizer))
    found: Columns = {name: list(encoded[name]) for name in names}
    columns = ("start_positions", "end_positions", "answer_mask", "offsets", "row")
    found |= {name: [] for name in columns}
    for window, sample in enumerate(encoded["overflow_to_sample_mapping"]):
        ids = encoded["input_ids"][window]
        cls = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
        parts = encoded.sequence_ids(window)
        offsets = [
            list(offset) if part == 1 else [-1, -1]
            for offset, part in zip(encoded["offset_mapping"][window], parts, strict=True)
        ]
        start, end = _span(offsets, batch["answers"][sample], cls)
        allowed = [int(at == cls or offset[0] >= 0) for at, offset in enumerate(offsets)]
        values = (start, end, allowed, offsets, batch["_row"][sample])
        for name, value in zip(columns, values, strict=True):
            found[name].append(value)
    return found


def _check_questions(
    batch: Batch, tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int
) -> None:
    questions = tokenizer(list(batch["question"]), add_special_tokens=False, verbose=False)
    special = tokenizer.num_special_tokens_to_add(pair=True)
    for row, ids in zip(batch["_row"], questions["input_ids"], strict=True):
        if len(ids) + special + stride >= max_length:
            raise InputError(
                f"row {row}: the question has {len(ids)} tokens, which leaves none for the context "
                f"beside a stride of {stride} in max_length={max_length}: raise it, or leave out "
                "such rows"
            )


def _span(offsets: list[list[int]], answers: Mapping[str, Any], cls: int) -> tuple[int, int]:
    """First and last token of the first answer in a window; CLS where it is not wholly in it."""
    context = [at for at, offset in enumerate(offsets) if offset[0] >= 0]
    if not answers["text"] or not context:
        return cls, cls
    begin = answers["answer_start"][0]
    end = begin + len(answers["text"][0])
    if offsets[context[0]][0] > begin or offsets[context[-1]][1] < end:
        return cls, cls
    first = next(at for at in context if offsets[at][1] > begin)
    last = next(at for at in reversed(context) if offsets[at][0] < end)
    return first, last


# ---- Masked language modelling ----


def tokenize_texts(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    num_proc: int | None = None,
) -> tuple[Dataset, str]:
    """Rows of `text`: `input_ids` and `special_tokens_mask`; long texts go on in further rows."""
    _check_length(tokenizer, max_length)
    _check_fast(tokenizer, "the rest of a long text")
    features = {"input_ids": _IDS, "special_tokens_mask": List(Value("int8"))}
    settings = {"tokenizer": tokenizer, "max_length": max_length}
    found = _mapped(rows, _texts, settings, features, num_proc)
    return found, f"{_line(rows, {})}; {len(found):,} rows of at most {max_length} tokens"


def _texts(
    batch: Batch, tokenizer: PreTrainedTokenizerBase, max_length: int, version: int
) -> Columns:
    encoded = tokenizer(
        list(batch["text"]),
        truncation=True,
        max_length=max_length,
        return_overflowing_tokens=True,
        return_special_tokens_mask=True,
    )
    return {name: list(encoded[name]) for name in ("input_ids", "special_tokens_mask")}


def masking_collator(
    tokenizer: PreTrainedTokenizerBase, *, probability: float = 0.15, seed: int | None = None
) -> DataCollatorForLanguageModeling:
    """A collator that masks random tokens at each call, with `labels` for the masked ones.

    probability: that a token is masked; seed: of the random choice
    raises: InputError for a tokenizer without a mask token
    """
    if tokenizer.mask_token is None:
        raise InputError(
            "the tokenizer has no mask token: give the tokenizer of a masked language model, such "
            "as BERT"
        )
    if not 0 < probability < 1:
        raise InputError(f"probability is {probability}, but must be between 0 and 1")
    return DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability, seed=seed)


# ---- Common ----


def label_names(labels: Labels) -> dict[str, Any]:
    """Settings for a model's config: `num_labels`, `id2label`, `problem_type`, ..."""
    types = {
        "single": "single_label_classification",
        "several": "multi_label_classification",
        "regression": "regression",
    }
    if labels.kind == "regression":
        return {"num_labels": 1, "problem_type": types[labels.kind]}
    return {
        "id2label": dict(enumerate(labels.names)),
        "label2id": {name: index for index, name in enumerate(labels.names)},
        "problem_type": types[labels.kind],
    }


def _mapped(
    rows: Dataset,
    function: Any,
    settings: dict[str, Any],
    features: Mapping[str, Any],
    num_proc: int | None = None,
) -> Dataset:
    return rows.map(
        function,
        batched=True,
        batch_size=200,
        fn_kwargs={**settings, "version": VERSION},
        remove_columns=rows.column_names,
        features=Features(dict(features)),
        num_proc=num_proc,
        desc="tokenize",
    )


def _segments(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {_SEGMENTS: _IDS} if _SEGMENTS in tokenizer.model_input_names else {}


def _line(rows: Dataset, marked: Mapping[str, Any]) -> str:
    """How many rows there are, and how many of them are marked."""
    parts = [f"{int(flags.sum()):,} {what}" for what, flags in marked.items() if flags.any()]
    return "; ".join([f"{len(rows):,} row{'s' if len(rows) > 1 else ''} tokenized", *parts])


def _check_length(tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    limit = tokenizer.model_max_length
    if not 2 <= max_length <= limit:
        raise InputError(
            f"max_length is {max_length}, but must be 2 to {limit}, the limit of the tokenizer's "
            "model"
        )


def _check_fast(tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    if not tokenizer.is_fast:
        raise InputError(
            f"the tokenizer is a {type(tokenizer).__name__}, which does not report {what}: use a "
            "fast one (PreTrainedTokenizerFast)"
        )
