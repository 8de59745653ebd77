"""Turn raw rows of other tasks than causal language modelling into token ids and labels.

`data.task_rows` reads the rows; `data.task_tokens`, `data.question_windows` and `data.masked_texts`
tokenize them. This module combines both for a model: its task decides the columns, its config the
classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hf_distill.data.deduplicate import column
from hf_distill.data.labels import Labels, as_index_lists
from hf_distill.data.masked_texts import tokenize_texts
from hf_distill.data.model_labels import aligned_rows, check_kind, model_labels
from hf_distill.data.prompts import has_languages
from hf_distill.data.question_windows import tokenize_questions
from hf_distill.data.source_target import PAIRS
from hf_distill.data.task_rows import (
    LABELLED,
    QUESTION,
    TAGGED,
    TEXT,
    TEXT_PAIRS,
    columns_read,
    read_labelled,
    read_questions,
    read_source_target,
    read_tagged,
    read_texts,
)
from hf_distill.data.task_tokens import tokenize_labelled, tokenize_source_target, tokenize_tagged
from hf_distill.errors import InputError
from hf_distill.losses.targets import IGNORE
from hf_distill.tasks import Task, named_task

# The columns that the rows of a task hold, as a message names them.
FORMS = {
    "seq2seq-lm": "document and summary, source and target, or translation",
    "masked-lm": "text",
    "sequence-classification": "text (or a pair, such as premise and hypothesis) and label",
    "token-classification": "tokens and tags",
    "question-answering": "question, context and answers",
}


@dataclass(frozen=True)
class TaskTokens:
    """How raw rows become token ids.

    max_length: tokens of a row (of a source, of a window) at most
    max_target_length: tokens of a target text at most
    prefix: put before each source text
    source_lang, target_lang: fields of `translation`, and the codes of a tokenizer that has them
    stride: tokens that consecutive windows of a context share
    """

    max_length: int
    max_target_length: int
    prefix: str = ""
    source_lang: str | None = None
    target_lang: str | None = None
    stride: int = 128


def is_raw_for(task: str, names: Sequence[str]) -> bool:
    """Whether columns are those of raw rows for a task, given by its key."""
    there = set(names)

    def held(known: Mapping[str, Sequence[str]], *needed: str) -> bool:
        return all(there.intersection(known[name]) for name in needed)

    if "input_ids" in there:
        return False
    if task == "seq2seq-lm":
        return "translation" in there or any(set(pair) <= there for pair in PAIRS)
    if task == "sequence-classification":
        paired = any(set(pair) <= there for pair in TEXT_PAIRS)
        return held(LABELLED, "label") and (paired or held(LABELLED, "text"))
    if task == "token-classification":
        return held(TAGGED, "tokens", "tags")
    if task == "question-answering":
        return held(QUESTION, "question", "context", "answers")
    return held(TEXT, "text")


def tokenize_task_rows(
    task: Task,
    config: PreTrainedConfig,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    how: TaskTokens,
    *,
    keep: Sequence[str] = (),
) -> tuple[Dataset, str]:
    """Token ids and labels of raw rows.

    task, config: of the model; its `id2label` names the classes
    rows: as `is_raw_for` knows them
    keep: further columns to carry along, one number a row
    returns: rows as the functions of `data.task_tokens` return them, and one line that reports the
        result. A row whose label is null (or -100) has no label
    raises: InputError for a row that cannot be used, or a label that the model does not have
    """
    kept = {name: rows.with_format(None)[name] for name in keep if name in rows.column_names}
    if task.key == "seq2seq-lm":
        found, line = _source_target(rows, tokenizer, how)
    elif task.key == "question-answering":
        read = read_questions(rows)
        found, line = tokenize_questions(
            read, tokenizer, max_length=how.max_length, stride=how.stride
        )
        kept = {name: np.asarray(values)[column(found, "row")] for name, values in kept.items()}
    elif task.key == "masked-lm":
        if kept:
            raise InputError(
                f"the rows have {next(iter(kept))!r}, which cannot be kept, since long texts "
                "continue in further rows: tokenize them first (hf_distill.data.tokenize_texts)"
            )
        found, line = tokenize_texts(read_texts(rows), tokenizer, max_length=how.max_length)
    else:
        found, line = _labelled(task, config, rows, tokenizer, how.max_length)
    for name, values in kept.items():
        found = found.add_column(name, np.asarray(values, dtype=np.float64))
    return found, line


def _source_target(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, how: TaskTokens
) -> tuple[Dataset, str]:
    columns = None
    if not any(set(pair) <= set(rows.column_names) for pair in PAIRS):
        fields = list(rows.with_format(None)[0]["translation"])
        if how.source_lang is None or how.target_lang is None:
            raise InputError(
                f"the column translation holds {', '.join(fields)}: set source_lang and target_lang"
            )
        columns = {
            "source": f"translation.{_field(fields, how.source_lang)}",
            "target": f"translation.{_field(fields, how.target_lang)}",
        }
    coded = has_languages(tokenizer)
    return tokenize_source_target(
        read_source_target(rows, columns),
        tokenizer,
        max_source_length=how.max_length,
        max_target_length=how.max_target_length,
        prefix=how.prefix,
        source_lang=how.source_lang if coded else None,
        target_lang=how.target_lang if coded else None,
    )


def _field(fields: Sequence[str], language: str) -> str:
    """The field of a language: its code, or what comes before "_" in it (en_XX)."""
    for name in (language, language.partition("_")[0]):
        if name in fields:
            return name
    raise InputError(
        f"the column translation holds {', '.join(fields)}, but no {language!r}: give one of these "
        "as source_lang and target_lang, or rename the field"
    )


# ---- Labels ----


def _labelled(
    task: Task,
    config: PreTrainedConfig,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> tuple[Dataset, str]:
    labels = model_labels(task, config)
    tagged = task.key == "token-classification"
    known = TAGGED["tags"] if tagged else LABELLED["label"]
    name = next(one for one in known if one in rows.column_names)
    *inputs, target = columns_read(rows, tagged=tagged).values()
    rows = rows.with_format(None)
    if not tagged and labels.kind == "several":
        rows = as_index_lists(rows, name, len(labels.names))
    rows, named = _by_name(rows, name, labels)
    if tagged:
        found, line = tokenize_tagged(
            read_tagged(rows, labels=labels)[0], tokenizer, max_length=max_length
        )
        return found, _naming([*inputs, target], line) + named
    if str(getattr(rows.features[name], "dtype", "")) == "null":  # no row has a label
        kinds: dict[str, Any] = {"regression": Value("float64"), "several": List(Value("int64"))}
        rows = rows.cast_column(name, kinds.get(labels.kind, Value("int64")))
    check_kind(rows, name, labels)
    rows, without = _fill(rows, name, labels)
    read, _ = read_labelled(rows, labels=labels)
    found, line = tokenize_labelled(read, tokenizer, max_length=max_length)
    if without.any():
        found = without_label(found, without, labels)
        line += f"; {int(without.sum()):,} without a label, for the divergence only"
    return found, _naming(inputs if without.all() else [*inputs, target], line) + named


def _naming(columns: Sequence[str], line: str) -> str:
    """The line that reports the result, with the columns that were read."""
    return line.replace(" tokenized", f" of {' + '.join(columns)} tokenized", 1)


def _by_name(rows: Dataset, name: str, labels: Labels) -> tuple[Dataset, str]:
    """Rows whose classes have the model's order, and a note where their names are others."""
    feature = rows.features[name]
    names = getattr(getattr(feature, "feature", feature), "names", None)
    if not names or labels.kind == "regression" or list(names) == list(labels.names):
        return rows, ""
    if (aligned := aligned_rows(rows, name, labels)) is not None:
        return aligned, ""
    return rows, f"; classes by index: {names[0]!r} is the model's {labels.names[0]!r}, and so on"


def _fill(rows: Dataset, name: str, labels: Labels) -> tuple[Dataset, np.ndarray]:
    """Rows with a placeholder where a label is missing, and which rows these are."""
    cells = rows[name]
    # A number that is not equal to itself is NaN.
    without = np.array(
        [cell is None or cell in (IGNORE, [IGNORE]) or cell != cell for cell in cells]
    )
    if not without.any():
        return rows, without
    placeholder: Any = {"single": 0, "several": [], "regression": 0.0}[labels.kind]
    if labels.kind == "single" and any(isinstance(cell, str) for cell in cells):
        placeholder = labels.names[0]
    filled = [placeholder if w else cell for cell, w in zip(cells, without, strict=True)]
    features = Features({name: rows.features[name]})
    return rows.remove_columns(name).add_column(name, filled, feature=features[name]), without


def without_label(rows: Dataset, without: np.ndarray, labels: Labels) -> Dataset:
    """Rows of token ids with "no label" where a label was missing."""
    width = len(labels.names)
    nothing: Any = {
        "single": IGNORE,
        "several": [float(IGNORE)] * width,
        "regression": float("nan"),
    }[labels.kind]
    given = [nothing if w else cell for cell, w in zip(rows["labels"], without, strict=True)]
    feature: Any = {"several": List(Value("float32")), "regression": Value("float32")}.get(
        labels.kind, Value("int64")
    )
    return rows.remove_columns("labels").add_column("labels", given, feature=feature)


def known_task_forms(task: str) -> str:
    """What rows of a task hold, for messages."""
    return f"for {named_task(task).name} {FORMS[task]}"
