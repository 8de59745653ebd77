"""Tokenize the raw rows that a trainer of a causal language model is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import PreTrainedTokenizerBase

from hf_distill.data import (
    TEACHER_PROMPT,
    TEACHER_PROMPT_IDS,
    Collator,
    collator,
    find_form,
    holds_prompts,
    tokenize_prompts,
    tokenize_raw_rows,
)
from hf_distill.data.forms import known_forms
from hf_distill.data.raw_rows import column_names
from hf_distill.errors import InputError
from hf_distill.losses.targets import WEIGHTS
from hf_distill.models.loading import local_tokenizer
from hf_distill.training.arguments import DistillationArguments

DEFAULT_MAX_LENGTH = 1024  # as in TRL's SFTTrainer
EVALUATED, PREDICTED = "eval_dataset", "test_dataset"  # the arguments of `evaluate` and `predict`


class RowPreparation:
    """Tokenizes raw rows; rows that have token ids are not changed.

    tokenizer: the trainer's `processing_class`; by default the one in a local student's folder
    positions: the most tokens that the student takes, None if there is no limit
    own_collator: whether the user gave a collator
    lines: one line for each data set, which reports the result
    """

    def __init__(
        self,
        args: DistillationArguments,
        tokenizer: Any,
        model: Any,
        positions: int | None,
        *,
        own_collator: bool,
    ) -> None:
        self.args, self.tokenizer, self._positions = args, tokenizer, positions
        self._own_collator = own_collator
        # Not the model itself, which `model_init` may have made only for this.
        self._model_name = getattr(model, "name_or_path", None)
        self.lines: list[str] = []

    def __call__(self, dataset: Any, name: str) -> Any:
        """The data set with token ids. name: of the trainer's argument, for messages."""
        if isinstance(dataset, DatasetDict | IterableDatasetDict) and name == "train_dataset":
            splits = ", ".join(map(repr, dataset))
            raise InputError(
                f"{name} is a {type(dataset).__name__} with the splits {splits}: give one of them, "
                f"as dataset[{next(iter(dataset), 'train')!r}]"
            )
        if name == "train_dataset" and not (self.args.on_policy or self.args.on_policy_raise):
            self._refuse_teacher_prompts(dataset)
        if isinstance(dataset, Mapping):
            return {key: self(rows, f"{name}[{key!r}]") for key, rows in dataset.items()}
        if not self._raw(_names(dataset), name):
            return self.tokenized(dataset, name)
        if isinstance(dataset, list | tuple):
            dataset = Dataset.from_list(list(dataset))
        tokenizer = self._tokenizer(name)
        with self.args.main_process_first(desc="tokenizing", local=False):
            rows, line = self.tokenize(dataset, name, tokenizer)
        self.lines.append(f"{name}: {line}")
        return rows

    def _refuse_teacher_prompts(self, dataset: Any) -> None:
        names: Any = getattr(dataset, "column_names", None) or ()
        if isinstance(dataset, list | tuple) and dataset and isinstance(dataset[0], Mapping):
            names = dataset[0]
        for column in (TEACHER_PROMPT, TEACHER_PROMPT_IDS):
            if column in names:
                raise InputError(
                    f"train_dataset has {column!r}, which the teacher reads before text that the "
                    "student generates, but on_policy is 0: set on_policy, or remove the column"
                )

    def known(self, names: Sequence[str]) -> bool:
        """Whether rows with these columns are of a known raw form, and not tokenized yet."""
        return "input_ids" not in names and (
            find_form(names) is not None or self.prompts_only(names)
        )

    def prompts_only(self, names: Sequence[str]) -> bool:
        """Whether rows with these columns are prompts whose completions the student writes."""
        if self.args.on_policy and TEACHER_PROMPT in names and "completion" in names:
            raise InputError(
                f"the rows have {TEACHER_PROMPT!r} and completions, but a teacher with its own "
                "prompt is for text that the student generates: leave out the column 'completion'"
            )
        return bool(self.args.on_policy) and holds_prompts(names)

    def known_forms(self) -> str:
        """The known raw forms, for messages."""
        return known_forms()

    def tokenize(
        self, dataset: Dataset | IterableDataset, name: str, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[Dataset | IterableDataset, str]:
        """Raw rows as token ids, and one line that says what was done."""
        length = self._max_length(tokenizer)
        if TEACHER_PROMPT_IDS in column_names(dataset):
            raise InputError(
                f"{name} has raw rows with {TEACHER_PROMPT_IDS!r}, which is for rows of token ids: "
                f"give {TEACHER_PROMPT!r} (text or messages) beside 'prompt', or remove the column"
            )
        if self.prompts_only(column_names(dataset)):
            if self.args.packing:
                raise InputError("on_policy needs one document a row: set packing to False")
            return tokenize_prompts(dataset, tokenizer, max_length=length)
        return tokenize_raw_rows(
            dataset,
            tokenizer,
            max_length=length,
            packing=self.args.packing,
            completion_only_loss=self.args.completion_only_loss,
            assistant_only_loss=self.args.assistant_only_loss,
            keep=WEIGHTS,
        )

    def report(self) -> None:
        """Print the lines of the data sets that were tokenized since the last report."""
        lines, self.lines = self.lines, []
        if self.args.process_index == 0:
            for line in lines:
                print(line)

    def tokenized(self, dataset: Any, name: str) -> Any:
        """Rows that are tokenized already, or that this trainer does not look into."""
        return dataset

    def collator(self) -> Callable[[Sequence[Any]], dict[str, Any]] | None:
        """The collator of a trainer that is given none."""
        if isinstance(self.tokenizer, PreTrainedTokenizerBase):
            return collator(self.tokenizer)
        return Collator(0, 0)  # any id will do: what pads is masked

    def _raw(self, names: Sequence[str], name: str) -> bool:
        if not self.args.remove_unused_columns and self._own_collator:
            return False  # the user's collator reads the rows as they are
        if self.known(names):
            return True
        if "input_ids" not in names and not self._own_collator and names:
            raise self.unknown(name, names)
        return False

    def unknown(self, name: str, names: Sequence[str]) -> InputError:
        """The error for rows of no known form."""
        return InputError(
            f"{name} has the columns {', '.join(names)}: rows need input_ids, or the columns "
            f"of a known form ({self.known_forms()})"
        )

    def _tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            self.tokenizer = local_tokenizer(self._model_name)
        if not isinstance(self.tokenizer, PreTrainedTokenizerBase):
            raise InputError(
                f"{name} holds raw rows, but the trainer has no tokenizer for them: "
                "pass processing_class="
            )
        return self.tokenizer

    def _max_length(self, tokenizer: PreTrainedTokenizerBase) -> int:
        limits = [tokenizer.model_max_length, self._positions or DEFAULT_MAX_LENGTH]
        wanted = self.args.max_length
        return min(DEFAULT_MAX_LENGTH, *limits) if wanted is None else wanted


def _names(dataset: Any) -> list[str]:
    """The columns of rows; none where they are not known, as of a torch data set."""
    if isinstance(dataset, list | tuple):
        first = dataset[0] if dataset else None
        return list(first) if isinstance(first, Mapping) else []
    return column_names(dataset) if isinstance(dataset, Dataset | IterableDataset) else []
