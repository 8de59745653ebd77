"""Turn the recipe's ``data:`` section into clean rows, with a table of what was removed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict

from hf_distill.data.clean import CHANGES, REASONS, examine
from hf_distill.data.collect import COLUMNS, collect
from hf_distill.data.config import DataConfig, Format
from hf_distill.data.decontaminate import contained
from hf_distill.data.deduplicate import (
    Indices,
    Mask,
    Signatures,
    column,
    near_evaluation,
    near_repeated,
    repeated,
    smallest,
)
from hf_distill.data.hashing import Hashes, mix
from hf_distill.data.preparation_table import PreparationTable, Step
from hf_distill.data.sources import hub_id
from hf_distill.errors import InputError


@dataclass
class _Part:
    """The remaining rows of one split: a table on disk and the indices of the rows in it."""

    split: str
    rows: Dataset
    indices: Indices

    def values(self, name: str) -> np.ndarray:
        return column(self.rows, name)[self.indices]

    def keys(self, seed: int) -> Hashes:
        """Numbers that order the rows at random, by content and seed only."""
        return mix(self.values("_hash") ^ mix(np.array([seed % 2**64], dtype=np.uint64)))

    def drop(self, mask: Mask) -> int:
        self.indices = self.indices[~mask]
        return int(mask.sum())

    def selected(self, name: Format) -> Dataset:
        return self.rows.select(self.indices).select_columns(list(COLUMNS[name]))

    def step(
        self,
        name: str,
        removed: dict[str, int] | None = None,
        changed: dict[str, int] | None = None,
    ) -> Step:
        characters = int(self.values("_characters").sum())
        return Step(
            name,
            self.split,
            len(self.indices),
            characters,
            removed=removed or {},
            changed=changed or {},
        )


def clean_rows(
    config: DataConfig, *, seed: int, work_dir: Path
) -> tuple[DatasetDict, PreparationTable]:
    """Collect, repair and filter rows, hold out evaluation rows, remove overlap and duplicates.

    seed: decides which rows are held out or sampled
    work_dir: for Arrow files; a second call with the same settings and files reuses them
    returns: the splits of ``config.train_places`` and ``config.eval_splits`` with the columns text,
        or prompt and completion, or messages; and the table of steps. Neither depends on
        ``num_proc``.
    raises: InputError if a file is bad, or no training or evaluation row is left
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    table = PreparationTable()
    trains: list[tuple[_Part, Format]] = []
    for split, of_split in config.train_places.items():
        train, name, collected = _part(config, of_split, split, config.split, work_dir)
        table = table.add(collected, _filter(train))
        trains.append((train, name))
    places, hub_split = evaluation_places(config)
    evaluations: list[tuple[_Part, Format]] = []
    if not places:
        ((train, name),) = trains
        held_out = _hold_out(train, config.eval_fraction, seed)
        _refuse_single_row(train, held_out, config)
        table = table.add(train.step("hold out"))
        evaluations.append((held_out, name))
    for split, of_split in places.items():
        evaluation, other, collected = _part(config, of_split, split, hub_split, work_dir)
        if split == "eval" and trains[0][0].split == "train" and other != trains[0][1]:
            raise InputError(f"training rows are {trains[0][1]} but evaluation rows are {other}")
        table = table.add(collected, _filter(evaluation))
        evaluations.append((evaluation, other))
    for evaluation, _ in evaluations:
        table = table.add(_settle_evaluation(evaluation, config, seed))
        _require(evaluation, "evaluation", table)
    for train, name in trains:
        if (share := config.clean.eval_overlap) is not None:
            for evaluation, other in evaluations:
                table = table.add(_remove_overlap(train, evaluation, config, (name, other), share))
        table = table.add(_remove_repeated(train, config))
        if config.max_train_rows is not None:
            table = table.add(_sample(train, config.max_train_rows, seed))
        _require(train, "training", table)
    parts = [*trains, *evaluations]
    return DatasetDict({part.split: part.selected(name) for part, name in parts}), table


def text_iterator(rows: Dataset | DatasetDict) -> Iterator[str]:
    """Every text of the (training) rows, one by one, to train a tokenizer on."""
    splits = [rows]
    if isinstance(rows, DatasetDict):
        splits = [part for split, part in rows.items() if split.startswith("train")]
    for part in splits:
        for row in part:
            for value in row.values():
                yield from _strings(value)


def _strings(value: Any) -> Iterator[str]:
    """The texts of a value: a text, a list of texts, or a list of messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield one["content"] if isinstance(one, dict) else one


def require_rows(dataset: Dataset, needed: int, what: str) -> None:
    """InputError unless there are as many rows as ``what`` (say, "one batch") needs."""
    if len(dataset) < needed:
        raise InputError(
            f"the corpus is too small for {what}: {len(dataset)} of {needed} rows; give more text, "
            "or lower the batch size or data.max_length"
        )


def check_max_length(max_length: int, positions: int | None, what: str) -> None:
    """InputError if rows may be longer than ``what`` (say, "the teacher") has positions.

    positions: None where there is no limit
    """
    if positions is not None and max_length > positions:
        raise InputError(
            f"data.max_length is {max_length}, but {what} has {positions} positions: "
            f"set data.max_length to at most {positions}"
        )


def _part(
    config: DataConfig, places: str | list[str], split: str, hub_split: str, work_dir: Path
) -> tuple[_Part, Format, Step]:
    rows, name, mapping = collect(config, places, hub_split, work_dir)
    examined = examine(rows, name, config.clean, split, config.num_proc)
    part = _Part(split, examined, np.arange(len(examined)))
    changed = {f"read as {mapping}": len(examined)} if mapping else {}
    return part, name, part.step("collect", changed=changed)


def evaluation_places(config: DataConfig) -> tuple[dict[str, list[str]], str]:
    """Where the evaluation rows of each split come from, and which split of the Hub's data sets.

    Without places rows are held out.
    """
    if config.eval_places:
        return config.eval_places, config.eval_split or "validation"
    if config.eval_split is None:
        if isinstance(config.train, dict):
            raise InputError(
                "data.train has several sets, from which no evaluation rows are held out: give "
                "data.eval"
            )
        return {}, ""
    places = config.train_places.get("train", [])
    if hub_id(places) is None:
        raise InputError(
            "data.eval_split names a split of a Hub data set, but data.train is local: "
            "give files as data.eval"
        )
    return {"eval": places}, config.eval_split


def _filter(part: _Part) -> Step:
    reasons = part.values("_reason")
    removed = {name: int((reasons == code).sum()) for code, name in enumerate(REASONS) if code}
    part.drop(reasons != 0)
    changed = {what: int(part.values(name).sum()) for name, what in CHANGES.items()}
    return part.step("clean", removed, changed)


def _hold_out(train: _Part, fraction: float, seed: int) -> _Part:
    """Move the rows with the smallest keys to evaluation. Equal rows have equal keys."""
    keys = train.keys(seed)
    if not len(keys):
        raise InputError("no row is left after cleaning: check data.clean and the files")
    held = smallest(keys, fraction)
    evaluation = _Part("eval", train.rows, train.indices[held])
    train.drop(held)
    return evaluation


def _refuse_single_row(train: _Part, evaluation: _Part, config: DataConfig) -> None:
    """InputError where all rows are equal, so that the hold-out has left nothing to train on."""
    if len(train.indices) or not len(evaluation.indices):
        return
    rows = len(evaluation.indices)
    what = "the data are a single row" if rows == 1 else f"the data are {rows} times one row"
    smaller = {"document": "paragraph or line", "paragraph": "line", "line": ""}[config.rows]
    cut = f", or cut the text into more rows (data.rows: {smaller})" if smaller else ""
    raise InputError(
        f"{what}, which was held out for evaluation, so that nothing is left to train on: give "
        f"evaluation rows as data.eval{cut}, or give more text"
    )


def _settle_evaluation(part: _Part, config: DataConfig, seed: int) -> Step:
    """Remove exact duplicates from the evaluation rows; near-duplicates are kept."""
    removed = {}
    if config.clean.exact_duplicates:
        removed["equal to an earlier row"] = part.drop(repeated(part.values("_hash")))
    if config.max_eval_rows is not None:
        removed |= _sample(part, config.max_eval_rows, seed).removed
    return part.step("evaluation rows", removed)


def _remove_overlap(
    train: _Part, evaluation: _Part, config: DataConfig, names: tuple[Format, Format], share: float
) -> Step:
    """names: the formats of both parts"""
    equal = train.drop(np.isin(train.values("_hash"), evaluation.values("_hash")))
    near = 0
    if (threshold := config.clean.near_duplicates) is not None:
        count = len(evaluation.indices)
        signatures = Signatures((evaluation.rows, evaluation.indices), (train.rows, train.indices))
        near = train.drop(near_evaluation(signatures, count, threshold)[count:])
    rows, held = train.selected(names[0]), evaluation.selected(names[1])
    inside = train.drop(contained(rows, held, names, share, config.num_proc))
    removed = {
        "equal to an evaluation row": equal,
        "near-duplicates of an evaluation row": near,
        "sharing text with an evaluation row": inside,
    }
    of_set = evaluation.split.removeprefix("eval").replace("/", " with ")
    return train.step(f"evaluation overlap{of_set}", removed)


def _remove_repeated(train: _Part, config: DataConfig) -> Step:
    removed = {}
    if config.clean.exact_duplicates:
        removed["equal to an earlier row"] = train.drop(repeated(train.values("_hash")))
    if (threshold := config.clean.near_duplicates) is not None:
        signatures = Signatures((train.rows, train.indices))
        removed["near-duplicates of an earlier row"] = train.drop(
            near_repeated(signatures, threshold)
        )
    return train.step("deduplicate", removed)


def _sample(part: _Part, most: int, seed: int) -> Step:
    gone = np.ones(len(part.indices), dtype=bool)
    gone[np.argsort(part.keys(seed), kind="stable")[:most]] = False
    return part.step("sample", {"not sampled": part.drop(gone)})


def _require(part: _Part, what: str, table: PreparationTable) -> None:
    if len(part.indices):
        return
    reasons: dict[str, int] = {}
    for step in table.steps:
        if step.split == part.split:
            for reason, count in step.removed.items():
                reasons[reason] = reasons.get(reason, 0) + count
    why = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none were given"
    raise InputError(f"no {what} rows are left ({why}): give more text or loosen data.clean")
