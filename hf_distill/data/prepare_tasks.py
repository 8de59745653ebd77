"""Prepare the rows of tasks other than causal language modelling for a recipe's ``data:`` section.

Rows are read and held out. Duplicates and training rows that overlap with evaluation rows are
removed. The rest is sampled and tokenized. The text of masked language models is cleaned by
`data.prepare`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from hf_distill.data.collect import collect_columns
from hf_distill.data.config import DataConfig
from hf_distill.data.deduplicate import repeated, smallest
from hf_distill.data.hashing import Hashes, mix, text_hash
from hf_distill.data.labels import Labels
from hf_distill.data.masked_texts import masking_collator, tokenize_texts
from hf_distill.data.model_labels import GivenLabels, fit_labels
from hf_distill.data.preparation_table import PreparationTable, Step
from hf_distill.data.prepare import clean_rows, evaluation_places
from hf_distill.data.question_windows import tokenize_questions
from hf_distill.data.task_forms import without_label
from hf_distill.data.task_rows import (
    label_column,
    read_labelled,
    read_questions,
    read_source_target,
    read_tagged,
    read_unlabelled,
    without_blanks,
)
from hf_distill.data.task_tokens import tokenize_labelled, tokenize_source_target, tokenize_tagged
from hf_distill.errors import InputError

# The format of each task's rows, and the columns that no training row may share with an evaluation
# row: of a question the context, whose other questions have answers nearby.
FORMATS = {
    "seq2seq-lm": "source_target",
    "question-answering": "questions",
    "sequence-classification": "labelled",
    "token-classification": "tagged",
    "masked-lm": "text",
}
UNITS = {
    "seq2seq-lm": ("source",),
    "question-answering": ("context",),
    "sequence-classification": ("text", "pair"),
    "token-classification": ("tokens",),
}


@dataclass(frozen=True)
class TaskRows:
    """Rows of text of all splits, the kind of their labels, and the table of steps.

    rows: with the split "unlabelled" if the settings name such rows
    note: which class is which, where a model without names of classes decides that; or ""
    """

    rows: DatasetDict
    labels: Labels | None
    table: PreparationTable
    note: str = ""


def read_task_rows(
    config: DataConfig,
    task: str,
    *,
    seed: int,
    work_dir: Path,
    given: GivenLabels | None = None,
) -> TaskRows:
    """Read the rows of a task, hold out evaluation rows, remove overlap and repeated rows.

    task: its key; seed: decides which rows are held out or sampled
    work_dir: for Arrow files; a second call with the same settings and files reuses them
    given: the labels of a model that exists, whose classes the labels of the rows are
    returns: rows with the columns that `data.task_rows` documents
    raises: InputError if a file or a row is bad, or no training or evaluation row is left
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    if task == "masked-lm":
        text = config.model_copy(update={"format": "text"})
        rows, table = clean_rows(text, seed=seed, work_dir=work_dir)
        return TaskRows(rows, None, table)
    places, hub_split = evaluation_places(config)
    source = _Source(config, task, work_dir)
    train, labels, note, removed = source.read(
        config.train_places["train"], config.split, None, given
    )
    if given is not None and labels is not None:
        given = replace(given, labels=labels)
    table = PreparationTable().add(Step("collect", "train", len(train), removed=removed))
    keys = _hashes(train, UNITS[task])
    held_out: dict[str, Dataset] = {}
    if not places:
        held = smallest(_mixed(keys, seed), config.eval_fraction)
        held_out["eval"], train, keys = _kept(train, held), _kept(train, ~held), keys[~held]
        table = table.add(Step("hold out", "train", len(train)))
    for split, of_split in places.items():
        held_out[split], _, _, removed = source.read(of_split, hub_split, labels, given)
        table = table.add(Step("collect", split, len(held_out[split]), removed=removed))
    for split, rows in held_out.items():
        held_out[split], step = _settled(rows, split, config, config.max_eval_rows, seed)
        table = table.add(step)
    if config.clean.eval_overlap is not None:
        names = UNITS[task]
        shared = np.isin(keys, np.concatenate([_hashes(r, names) for r in held_out.values()]))
        train = _kept(train, ~shared)
        removed = {f"with the {names[0]} of an evaluation row": int(shared.sum())}
        table = table.add(Step("evaluation overlap", "train", len(train), removed=removed))
    train, step = _settled(train, "train", config, config.max_train_rows, seed)
    table, splits = table.add(step), DatasetDict({"train": train, **held_out})
    if config.unlabelled is not None:
        splits["unlabelled"], step = _unlabelled(config, train, held_out.values(), work_dir)
        table = table.add(step)
    return TaskRows(splits, labels, table, note)


def _unlabelled(
    config: DataConfig, train: Dataset, held_out: Iterable[Dataset], work_dir: Path
) -> tuple[Dataset, Step]:
    """The rows without labels, without those whose text is in another split too."""
    places = config.unlabelled
    assert places is not None
    where = places if isinstance(places, str) else ", ".join(places)
    try:
        rows = read_unlabelled(
            collect_columns(config, places, config.split, work_dir), config.columns
        )
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    if ("pair" in rows.column_names) != ("pair" in train.column_names):
        ours, theirs = ("pairs of texts" if "pair" in split.column_names else "single texts"
                        for split in (rows, train))  # fmt: skip
        raise InputError(f"{where}: the rows without labels are {ours}, the others {theirs}")
    names = UNITS["sequence-classification"]
    hashes, removed = _hashes(rows, names), {}
    of_evaluation = np.concatenate([_hashes(split, names) for split in held_out])
    keep = np.ones(len(rows), dtype=bool)
    for reason, mask in {
        "equal to an earlier row": repeated(hashes),
        "with the text of an evaluation row": np.isin(hashes, of_evaluation),
        "with the text of a row with a label": np.isin(hashes, _hashes(train, names)),
    }.items():
        removed[reason] = int((mask & keep).sum())
        keep &= ~mask
    if not keep.any():
        raise InputError(f"{where}: no row without a label is left, all are rows of other splits")
    return _kept(rows, keep), Step("unlabelled", "train", int(keep.sum()), removed=removed)


def tokenize_splits(
    rows: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    task: str,
    table: PreparationTable,
    *,
    seed: int,
    labels: Labels | None = None,
) -> tuple[DatasetDict, PreparationTable, list[str]]:
    """Rows of token ids and labels, as `data.task_tokens` documents them.

    labels: what they are, needed for the split "unlabelled"
    seed: of the masks of evaluation rows, which are drawn once, so that evaluations agree
    returns: the rows, the longer table, and a line for each split that says what was cut
    """
    found: dict[str, Dataset] = {}
    lines = []
    for split in rows:
        if split == "unlabelled":
            assert labels is not None  # read with the rows that have some
            tokens, line = _tokenize_unlabelled(rows, tokenizer, config, labels)
            tokens = tokens.cast(found["train"].features)  # to be joined with them
        else:
            tokens, line = tokenize_split(rows[split], tokenizer, config, task)
        if task == "masked-lm" and split != "train":
            tokens = _masked(tokens, tokenizer, config.mask_probability, seed)
        found[split] = tokens
        lines.append(f"{split}: {line}")
        count = sum(map(len, tokens["input_ids"]))
        table = table.add(Step("tokenize", split, len(tokens), tokens=count))
    return DatasetDict(found), table, lines


def _tokenize_unlabelled(
    rows: DatasetDict, tokenizer: PreTrainedTokenizerBase, config: DataConfig, labels: Labels
) -> tuple[Dataset, str]:
    """Rows of text without labels as token ids, whose `labels` say that there is none."""
    texts, labelled = rows["unlabelled"], rows["train"].with_format(None)
    any_label, feature = labelled[0]["label"], labelled.features["label"]
    filled = texts.add_column("label", [any_label] * len(texts), feature=feature)
    tokens, line = tokenize_split(filled, tokenizer, config, "sequence-classification")
    return without_label(tokens, np.ones(len(tokens), dtype=bool), labels), line


def tokenize_split(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, config: DataConfig, task: str
) -> tuple[Dataset, str]:
    """Rows of text as token ids and labels, and a line that says what was cut."""
    settings: dict[str, Any] = {"max_length": config.max_length}
    if task == "seq2seq-lm":
        settings = {
            "max_source_length": config.max_length,
            "max_target_length": config.max_target_length,
            "prefix": config.prefix,
            "source_lang": config.source_lang,
            "target_lang": config.target_lang,
        }
    elif task == "question-answering":
        settings["stride"] = config.stride
    function: Any = {
        "seq2seq-lm": tokenize_source_target,
        "question-answering": tokenize_questions,
        "sequence-classification": tokenize_labelled,
        "token-classification": tokenize_tagged,
        "masked-lm": tokenize_texts,
    }[task]
    return function(rows, tokenizer, num_proc=config.num_proc, **settings)


@dataclass(frozen=True)
class _Source:
    """Where the rows of a task come from, and how they are read."""

    config: DataConfig
    task: str
    work_dir: Path

    def read(
        self,
        places: str | list[str],
        split: str,
        labels: Labels | None,
        given: GivenLabels | None,
    ) -> tuple[Dataset, Labels | None, str, dict[str, int]]:
        """The rows of some places, the kind of their labels, a note on these, and rows left out.

        labels: those of the training rows, for evaluation rows
        given: those of a model, which decide the indices
        """
        columns = self.config.columns
        rows, note = collect_columns(self.config, places, split, self.work_dir), ""
        where = places if isinstance(places, str) else ", ".join(places)
        try:
            rows, removed = without_blanks(rows, self.task, columns)
            if given is not None:
                tagged = self.task == "token-classification"
                column = label_column(rows, columns, tagged=tagged)
                rows, found, note = fit_labels(rows, column, given, tagged=tagged)
                labels = found.labels if labels is None and found is not None else labels
            readers: Mapping[str, Any] = {
                "seq2seq-lm": read_source_target,
                "question-answering": read_questions,
                "sequence-classification": partial(read_labelled, labels=labels),
                "token-classification": partial(read_tagged, labels=labels),
            }
            read = readers[self.task](rows, columns)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        read, labels = read if isinstance(read, tuple) else (read, None)
        return read, labels, note, removed


def _hashes(rows: Dataset, names: Sequence[str]) -> Hashes:
    """(rows,) hashes of the content of some columns, of those that are there."""
    there = [name for name in names if name in rows.column_names]
    columns = (rows[name] for name in there)
    texts = (json.dumps(cells, sort_keys=True) for cells in zip(*columns, strict=True))
    return np.fromiter(map(text_hash, texts), dtype=np.uint64, count=len(rows))


def _kept(rows: Dataset, mask: Any) -> Dataset:
    return rows.select(np.flatnonzero(mask))


def _settled(
    rows: Dataset, split: str, config: DataConfig, most: int | None, seed: int
) -> tuple[Dataset, Step]:
    """The rows without repeated ones, and a sample of them if they are too many."""
    names = [name for name in rows.column_names if name != "id"]
    hashes = _hashes(rows, names)
    keep, removed = np.ones(len(rows), dtype=bool), {}
    if config.clean.exact_duplicates:
        keep = ~repeated(hashes)
        removed["equal to an earlier row"] = int((~keep).sum())
    if most is not None and keep.sum() > most:
        left = np.flatnonzero(keep)
        order = np.argsort(_mixed(hashes[left], seed), kind="stable")
        keep[left[order[most:]]] = False
        removed["not sampled"] = len(left) - most
    rows = _kept(rows, keep)
    if not len(rows):
        what = "training" if split == "train" else "evaluation"
        raise InputError(f"no {what} rows are left: give more, or another data.eval_fraction")
    return rows, Step("deduplicate", split, len(rows), removed=removed)


def _mixed(hashes: Hashes, seed: int) -> Hashes:
    """Numbers that order rows at random, by content and seed only."""
    return mix(hashes ^ mix(np.array([seed % 2**64], dtype=np.uint64)))


def _masked(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, probability: float, seed: int
) -> Dataset:
    """Rows with fixed masks, and `labels` for the masked tokens."""
    mask = masking_collator(tokenizer, probability=probability, seed=seed)

    def one(row: Mapping[str, Any]) -> dict[str, Any]:
        batch = mask([dict(row)])
        return {name: batch[name][0].tolist() for name in ("input_ids", "labels")}

    return Dataset.from_list([one(row) for row in rows])
