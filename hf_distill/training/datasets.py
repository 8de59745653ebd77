"""Turn the data sets that a trainer is given into rows of token ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import PreTrainedTokenizerBase

from hf_distill.data import (
    Collator,
    collator,
    find_form,
    is_raw,
    task_collator,
    tokenize_raw_rows,
)
from hf_distill.data.forms import known_forms
from hf_distill.errors import InputError
from hf_distill.losses.targets import WEIGHTS
from hf_distill.models.base import base_model
from hf_distill.models.from_scratch import max_positions
from hf_distill.models.loading import local_tokenizer
from hf_distill.tasks import find_task
from hf_distill.training.arguments import DistillationArguments
from hf_distill.training.task_datasets import TaskRowPreparation

DEFAULT_MAX_LENGTH = 1024  # as in TRL's SFTTrainer


def prepare_datasets(
    args: DistillationArguments, student: Any, given: dict[str, Any], task: str | None
) -> None:
    """Tokenize the raw data sets among a trainer's arguments, in place, and say what was done.

    given: the trainer's keyword arguments; a tokenizer that had to be found is added to them, and
        a collator where there is none
    """
    task = "causal-lm" if student is None else find_task(student, "student", task).key
    limit = None if student is None else max_positions(base_model(student).config)
    own = given.get("data_collator") is not None
    tokenizer = given.get("processing_class")
    prepare = RowPreparation(args, tokenizer, student, limit, own_collator=own, task=task)
    for name in ("train_dataset", "eval_dataset"):
        if given.get(name) is not None:
            given[name] = prepare(given[name], name)
    given["processing_class"] = prepare.tokenizer
    if not own:
        given["data_collator"] = _default_collator(task, prepare, args)
    if args.process_index == 0:
        for line in prepare.lines:
            print(line)


def _default_collator(task: str, prepare: RowPreparation, args: DistillationArguments) -> Any:
    if task == "causal-lm":
        known = isinstance(prepare.tokenizer, PreTrainedTokenizerBase)
        # Without a tokenizer any id will do: what pads is masked.
        return collator(prepare.tokenizer) if known else Collator(0, 0)
    if not isinstance(tokenizer := prepare.find_tokenizer(), PreTrainedTokenizerBase):
        raise InputError("the rows need a tokenizer to pad them: pass processing_class=")
    return task_collator(task, tokenizer, probability=args.mask_probability)


class RowPreparation:
    """Tokenizes raw rows; rows that have token ids already pass untouched.

    tokenizer: the trainer's `processing_class`; found beside a local student if it is missing
    positions: the most tokens that the student takes, None if there is no limit
    own_collator: whether the user gave a collator
    lines: what was done, one line for each data set
    """

    def __init__(
        self,
        args: DistillationArguments,
        tokenizer: Any,
        model: Any,
        positions: int | None,
        *,
        own_collator: bool,
        task: str,
    ) -> None:
        self.args, self.tokenizer, self._model, self._positions = args, tokenizer, model, positions
        self._own_collator, self._task = own_collator, task
        config = None if model is None else base_model(model).config
        self._of_task = TaskRowPreparation(task, args, config)
        self.lines: list[str] = []

    def __call__(self, dataset: Any, name: str) -> Any:
        """The data set with token ids. name: of the trainer's argument, for messages."""
        if isinstance(dataset, DatasetDict | IterableDatasetDict) and name == "train_dataset":
            splits = ", ".join(map(repr, dataset))
            raise InputError(
                f"{name} is a {type(dataset).__name__} with the splits {splits}: give one of them, "
                f"as dataset[{next(iter(dataset), 'train')!r}]"
            )
        if isinstance(dataset, Mapping):
            return {key: self(rows, f"{name}[{key!r}]") for key, rows in dataset.items()}
        if isinstance(dataset, list | tuple):
            first = dataset[0] if dataset else None
            if not isinstance(first, Mapping) or "input_ids" in first:
                return dataset
            if self._task == "causal-lm" and not find_form(list(first)):
                return dataset
            dataset = Dataset.from_list(list(dataset))
        if not isinstance(dataset, Dataset | IterableDataset) or not self._raw(dataset, name):
            return dataset
        tokenizer = self._tokenizer(name)
        with self.args.main_process_first(desc="tokenizing", local=False):
            length = self._max_length(tokenizer)
            if self._task != "causal-lm":
                rows, line = self._of_task(dataset, name, tokenizer, length)
                self.lines.append(f"{name}: {line}")
                return rows
            rows, line = tokenize_raw_rows(
                dataset,
                tokenizer,
                max_length=length,
                packing=self.args.packing,
                completion_only_loss=self.args.completion_only_loss,
                assistant_only_loss=self.args.assistant_only_loss,
                keep=WEIGHTS,
            )
        self.lines.append(f"{name}: {line}")
        return rows

    def _raw(self, dataset: Dataset | IterableDataset, name: str) -> bool:
        if not self.args.remove_unused_columns and self._own_collator:
            return False  # the user's collator reads the rows as they are
        names = dataset.column_names or list(next(iter(dataset), {}))
        if self._task != "causal-lm":
            return "input_ids" not in names and not self._own_collator
        if is_raw(dataset):
            return True
        if "input_ids" not in names and not self._own_collator and names:
            raise InputError(
                f"{name} has the columns {', '.join(names)}: rows need input_ids, or the columns "
                f"of a known form ({known_forms()})"
            )
        return False

    def find_tokenizer(self) -> Any:
        """The trainer's, or that beside a local student."""
        if self.tokenizer is None and self._model is not None:
            self.tokenizer = local_tokenizer(getattr(self._model, "name_or_path", None))
        return self.tokenizer

    def _tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        if not isinstance(self.find_tokenizer(), PreTrainedTokenizerBase):
            raise InputError(
                f"{name} holds raw rows, but the trainer has no tokenizer to make tokens of them: "
                "pass processing_class="
            )
        return self.tokenizer

    def _max_length(self, tokenizer: PreTrainedTokenizerBase) -> int:
        limits = [tokenizer.model_max_length, self._positions or DEFAULT_MAX_LENGTH]
        wanted = self.args.max_length
        return min(DEFAULT_MAX_LENGTH, *limits) if wanted is None else wanted
