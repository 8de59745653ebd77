"""Raw rows of tasks other than causal language modelling, tokenized for the trainer."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_distill.data import (
    Labels,
    read_labelled,
    read_questions,
    read_source_target,
    read_tagged,
    read_texts,
    tokenize_labelled,
    tokenize_questions,
    tokenize_source_target,
    tokenize_tagged,
    tokenize_texts,
)
from hf_distill.errors import InputError
from hf_distill.losses.targets import WEIGHTS
from hf_distill.tasks.classification import is_unnamed
from hf_distill.training.arguments import DistillationArguments


class TaskRowPreparation:
    """Reads and tokenizes the rows of one task.

    task: its key; config: of the student, for the names of its classes
    """

    def __init__(self, task: str, args: DistillationArguments, config: Any) -> None:
        self.task, self.args, self._config = task, args, config
        self._labels: Labels | None = None

    def __call__(
        self, dataset: Any, name: str, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> tuple[Dataset, str]:
        """Rows of token ids and labels, and a line that says what was done.

        raises: InputError for a stream, and for rows without the columns of the task
        """
        if not isinstance(dataset, Dataset):
            raise InputError(
                f"{name} is a {type(dataset).__name__} of raw rows, which are tokenized for causal "
                "language models only: give a datasets.Dataset, or rows with input_ids"
            )
        if weights := [column for column in WEIGHTS if column in dataset.column_names]:
            raise InputError(
                f"{name} has raw rows with {weights[0]}, which would be lost: tokenize them first"
            )
        try:
            return self._tokenized(dataset, tokenizer, max_length)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error

    def _tokenized(
        self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> tuple[Dataset, str]:
        if self.task == "seq2seq-lm":
            return tokenize_source_target(
                read_source_target(dataset),
                tokenizer,
                max_source_length=max_length,
                max_target_length=self.args.max_target_length,
                prefix=self.args.source_prefix,
            )
        if self.task == "question-answering":
            stride = self.args.stride
            rows = read_questions(dataset)
            return tokenize_questions(rows, tokenizer, max_length=max_length, stride=stride)
        if self.task == "masked-lm":
            return tokenize_texts(read_texts(dataset), tokenizer, max_length=max_length)
        tagged = self.task == "token-classification"
        read = read_tagged if tagged else read_labelled
        rows, self._labels = read(dataset, labels=self._labels, names=self._names(dataset))
        tokenize = tokenize_tagged if tagged else tokenize_labelled
        return tokenize(rows, tokenizer, max_length=max_length)

    def _names(self, dataset: Dataset) -> list[str] | None:
        """The student's classes, in its order, where it names them."""
        known = self._config.id2label or {}
        if self._config.num_labels == 1 or is_unnamed(known):
            return None
        return [known[number] for number in sorted(known)]
