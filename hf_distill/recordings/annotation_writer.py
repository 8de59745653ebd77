"""Turn rows into rows with the teacher's targets and their scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xxhash
from datasets import Dataset, Features, Value

from hf_distill.data.forms import is_list
from hf_distill.data.prompts import Prompts
from hf_distill.data.source_target import SourceTarget, value_at, with_value
from hf_distill.data.tokenize import FINISHED
from hf_distill.errors import InputError
from hf_distill.models.generation import Generator
from hf_distill.recordings.row_format import model_hash, tokenizer_hash

TEXT = "teacher_text"
SCORES = {
    "teacher_log_prob": Value("float64"),
    "teacher_mean_log_prob": Value("float64"),
    FINISHED: Value("bool"),
}
_VERSION = 2  # part of every identity: raise it when the same settings would give other texts


@dataclass(frozen=True)
class AnnotationWriter:
    """Turns rows into rows with the teacher's targets.

    truncate: cut sources that are too long at the end; False makes them an error
    """

    generator: Generator
    prompts: Prompts
    columns: SourceTarget
    keep_targets: bool
    truncate: bool
    seed: int

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides an annotation except its rows, as JSON."""
        settings = self.generator.config.to_diff_dict()
        settings.pop("transformers_version", None)
        name = self.generator.model.config.name_or_path
        return {
            "version": _VERSION,
            "teacher": f"{model_hash(self.generator.model):016x}",
            "teacher_name": Path(name).name if name and Path(name).exists() else name,
            "tokenizer": f"{tokenizer_hash(self.prompts.tokenizer):016x}",
            "generation": json.loads(json.dumps(settings, sort_keys=True, default=str)),
            "n": self.generator.n,
            "seed": self.seed if self.generator.draws else None,
            "source": self.columns.source,
            "target": self.columns.target,
            "keep_targets": self.keep_targets,
            "prefix": self.prompts.prefix,
            "separator": self.prompts.separator,
            "max_source_length": self.prompts.limit,
        }

    def check_names(self, names: list[str]) -> None:
        """InputError for rows that have one of the new columns already."""
        new = [*SCORES, *([TEXT] if self.keep_targets else [])]
        there = [name for name in new if name in names]
        if there:
            raise InputError(f"the rows have a column {there[0]!r} already: remove or rename it")

    def check(self, dataset: Dataset) -> None:
        """InputError for the first row that cannot be annotated."""
        name = self.columns.source.partition(".")[0]
        needed = [name] if name in dataset.column_names else dataset.column_names
        for index, row in enumerate(dataset.with_format(None).select_columns(needed)):
            self._prompt(row, index)

    def rows(
        self,
        rows: list[dict[str, Any]],
        first: int,
        batch_size: int,
        report: Callable[[int, int], None] = lambda rows, tokens: None,
    ) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """The annotated rows, in their order, and counts.

        first: the index of the first row in the data set; with the seed it decides the samples
        report: called after each batch with its rows and new tokens
        """
        found = [self._prompt(row, first + i) for i, row in enumerate(rows)]
        ids = [prompt for prompt, _ in found]
        order = sorted(range(len(rows)), key=lambda i: (len(ids[i]), i))
        made: list[list[dict[str, Any]]] = [[] for _ in rows]
        counts = {"rows": len(rows), "cut": sum(cut for _, cut in found), "tokens": 0}
        counts |= {"empty": 0, "unfinished": 0}
        for at in range(0, len(order), batch_size):
            chosen = order[at : at + batch_size]
            seeds = [self._seeds(first + i) for i in chosen]
            written = self.generator.write([ids[i] for i in chosen], seeds)
            tokens = 0
            for i, texts in zip(chosen, written, strict=True):
                for one in texts:
                    text = self._text(rows[i], ids[i], one.ids)
                    scores = (one.log_prob, one.log_prob / max(one.tokens, 1), one.finished)
                    row = self._with_target(rows[i], text)
                    made[i].append(row | dict(zip(SCORES, scores, strict=True)))
                    tokens += one.tokens
                    counts["empty"] += not text.strip()
                    counts["unfinished"] += not one.finished
            counts["tokens"] += tokens
            report(len(chosen), tokens)
        return [row for of_row in made for row in of_row], counts

    def _prompt(self, row: Mapping[str, Any], index: int) -> tuple[list[int], bool]:
        """The ids that the teacher reads, and whether the end of the source was left out."""
        try:
            ids, tokens = self.prompts.encode(prompt_of(row, self.columns))
            if tokens > len(ids) and not self.truncate:
                raise InputError(
                    f"{self.columns.source!r} has {tokens} tokens, but the teacher reads at most "
                    f"{len(ids)}: leave out such rows, or set too_long='truncate'"
                )
        except InputError as error:
            raise InputError(f"row {index}: {error}") from error
        return ids, tokens > len(ids)

    def _text(self, row: Mapping[str, Any], prompt: list[int], ids: list[int]) -> str:
        """The text of the new ids; of a continued text with the space that begins it."""
        decode: Any = partial(self.prompts.tokenizer.decode, skip_special_tokens=True)
        alone: str = decode(ids)
        if self.prompts.encoder_decoder or is_list(value_at(row, self.columns.source)):
            return alone
        # SentencePiece's decoders remove the space of a first word.
        read, whole = decode(prompt), decode([*prompt, *ids])
        return f" {alone}" if whole == f"{read} {alone}" else alone

    def _with_target(self, row: dict[str, Any], text: str) -> dict[str, Any]:
        if self.keep_targets:
            return {**row, TEXT: text}
        source = value_at(row, self.columns.source)
        if not is_list(source):
            return with_value(row, self.columns.target, text)
        # Fields of other messages, such as tool calls, are null in this one.
        answer = dict.fromkeys(source[0]) | {"role": "assistant", "content": text}
        if not _is_answer(self.columns):
            return with_value(row, self.columns.target, [answer])
        return with_value(row, self.columns.target, [*_asked(source), answer])

    def features(self, given: Features) -> Features:
        """The features of annotated rows."""
        text = {TEXT: Value("string")} if self.keep_targets else {}
        target, source = self.columns.target, given.get(self.columns.source)
        if not self.keep_targets and (target in given or "." not in target):
            # A column of nulls has no text type; conversations keep that of their prompts.
            text = {target: Value("string") if isinstance(source, Value | None) else source}
        return Features({**given, **text, **SCORES})

    def _seeds(self, index: int) -> list[int]:
        keys = (f"{self.seed}/{index}/{number}" for number in range(self.generator.n))
        return [xxhash.xxh3_64_intdigest(key.encode()) >> 1 for key in keys]


def prompt_of(row: Mapping[str, Any], columns: SourceTarget) -> Any:
    """What the teacher reads of a row: a text or messages, without an answer that it replaces."""
    source = value_at(row, columns.source)
    return _asked(source) if _is_answer(columns) else source


def _is_answer(columns: SourceTarget) -> bool:
    return columns.source == columns.target


def _asked(messages: Any) -> Any:
    """A conversation without its last answer."""
    ends = is_list(messages) and messages and isinstance(messages[-1], Mapping)
    return messages[:-1] if ends and messages[-1].get("role") == "assistant" else messages
