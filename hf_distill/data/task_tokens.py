"""Tokenize sources and targets, labelled texts and tagged words, as `data.task_rows` reads them.

Each function returns rows of token ids, without padding, and one line that reports the result.
`labels` have the form that transformers' models take; `IGNORE` (-100) marks tokens without a label.
"""

from __future__ import annotations

import copy
import json
from typing import Any

from datasets import Dataset, Value
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from hf_distill.data.deduplicate import column
from hf_distill.data.labels import Labels
from hf_distill.data.prompts import for_languages
from hf_distill.data.token_rows import (
    IDS,
    Batch,
    Columns,
    check_fast,
    check_length,
    line_of,
    mapped,
    segments,
)
from hf_distill.data.tokenize import FINISHED, check_tokenizer
from hf_distill.losses.targets import IGNORE


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
        left out and counted. A target ends with the end of text, also where the tokenizer adds none
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
    features = {"input_ids": IDS, "labels": IDS} | notes
    found = mapped(rows, _source_target, settings, features, num_proc)
    cut = {
        f"sources cut at {max_source_length} tokens": column(found, "_source") > max_source_length,
        f"targets cut at {max_target_length} tokens": column(found, "_target") > max_target_length,
    }
    return found.remove_columns(list(notes)), line_of(rows, cut)


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
    end = _missing_end(tokenizer)
    length = limits[1] - len(end)
    cut = tokenizer(text_target=targets, truncation=True, max_length=length)["input_ids"]
    ended = [ids + end for ids in cut]
    finished = batch.get(FINISHED) or [True] * len(targets)
    return {
        "input_ids": cut_sources,
        "labels": [
            ids if whole or ids[-1] != tokenizer.eos_token_id else ids[:-1]
            for ids, whole in zip(ended, finished, strict=True)
        ],
        "_source": [len(ids) for ids in whole["input_ids"]],
        "_target": [len(ids) + len(end) for ids in whole["labels"]],
    }


def _missing_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end of a text, without which no model learns to stop, where the tokenizer adds none."""
    end = tokenizer.eos_token_id
    return [] if end is None or end in tokenizer(text_target="a")["input_ids"] else [end]


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
    check_length(tokenizer, max_length)
    features: dict[str, Any] = {"input_ids": IDS, "labels": rows.features["label"]}
    features |= segments(tokenizer) | {"_tokens": Value("int32")}
    settings = {"tokenizer": tokenizer, "max_length": max_length}
    found = mapped(rows, _labelled, settings, features, num_proc)
    cut = {f"cut at {max_length} tokens": column(found, "_tokens") > max_length}
    return found.remove_columns("_tokens"), line_of(rows, cut)


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

    The first piece of a token has its tag, further ones and special tokens have `IGNORE`. With a
    byte-level tokenizer (GPT-2, RoBERTa) each token begins with a space, as in running text.
    """
    check_length(tokenizer, max_length)
    check_fast(tokenizer, "the pieces of a token")
    features = {"input_ids": IDS, "labels": IDS, "_lost": Value("int32")} | segments(tokenizer)
    settings = {"tokenizer": with_spaces(tokenizer), "max_length": max_length}
    found = mapped(rows, _tagged, settings, features, num_proc)
    lost = column(found, "_lost")
    line = line_of(rows, {f"without all of their tags within {max_length} tokens": lost > 0})
    return found.remove_columns("_lost"), line


def with_spaces(tokenizer: Any) -> Any:
    """A tokenizer that puts a space before the first word; the same one if it is not byte-level.

    A byte-level tokenizer knows words in running text by their space. A model that was trained on
    words must be saved with this tokenizer.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    step = state["pre_tokenizer"] or {}
    steps = [step, *step.get("pretokenizers", [])]
    levels = [one for one in steps if one.get("type") == "ByteLevel"]
    if not levels or levels[0]["add_prefix_space"]:
        return tokenizer
    levels[0]["add_prefix_space"] = True
    spaced = copy.deepcopy(tokenizer)
    spaced.backend_tokenizer.pre_tokenizer = Tokenizer.from_str(json.dumps(state)).pre_tokenizer
    spaced.add_prefix_space = True
    spaced.init_kwargs["add_prefix_space"] = True  # saved, and read by the tokenizer's class
    return spaced


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
        given = [IGNORE if tag == -1 else tag for tag in tags]
        labels.append([given[w] if here else IGNORE for w, here in zip(words, first, strict=True)])
        lost.append(len(tags) - sum(first))
    found = {k: v for k, v in encoded.items() if k != "attention_mask"}
    return {**found, "labels": labels, "_lost": lost}


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
