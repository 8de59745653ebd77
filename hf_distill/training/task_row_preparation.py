"""Tokenize the raw rows that a trainer of another task is given, and choose the collator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from hf_distill.data import (
    TaskCollator,
    TaskTokens,
    is_raw_for,
    known_task_forms,
    mask_rows,
    tokenize_task_rows,
    with_spaces,
)
from hf_distill.errors import InputError
from hf_distill.losses.targets import IGNORE, WEIGHTS
from hf_distill.models.base import base_model
from hf_distill.models.from_scratch import max_positions
from hf_distill.models.loading import local_tokenizer
from hf_distill.models.positions import position_limit
from hf_distill.tasks import MaskedLM, QuestionAnswering, Seq2SeqLM, Task, TokenClassification
from hf_distill.training.arguments import DistillationArguments
from hf_distill.training.row_preparation import (
    DEFAULT_MAX_LENGTH,
    EVALUATED,
    PREDICTED,
    RowPreparation,
)

# As in transformers' own examples.
WINDOW_LENGTH, TARGET_LENGTH = 384, 128
# The column of labels that rows to predict may lack. Words need tags, which say what is predicted.
LABELS = {"sequence-classification": "label", "question-answering": "answers"}


class TaskRowPreparation(RowPreparation):
    """As `RowPreparation`, for the rows of another task than causal language modelling.

    task: of the student, whose config names its classes
    """

    def __init__(
        self,
        args: DistillationArguments,
        tokenizer: Any,
        model: Any,
        task: Task,
        *,
        own_collator: bool,
    ) -> None:
        plain = base_model(model)
        positions = position_limit(plain) or max_positions(plain.config)
        super().__init__(args, tokenizer, model, positions, own_collator=own_collator)
        self._task, self._config = task, plain.config

    def _tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        tokenizer = super()._tokenizer(name)
        if self._task.key == TokenClassification.key and tokenizer.is_fast:
            self.tokenizer = tokenizer = with_spaces(tokenizer)  # saved with the student
        return tokenizer

    def _raw(self, names: Sequence[str], name: str) -> bool:
        if name == PREDICTED:
            names = [*names, *self._unknown_labels(names)]
        return super()._raw(names, name)

    def _unknown_labels(self, names: Sequence[str]) -> list[str]:
        """The column of labels that rows to predict lack, if they lack nothing else."""
        key = self._task.key
        column = LABELS.get(key)
        if column is None or is_raw_for(key, names) or not is_raw_for(key, [*names, column]):
            return []
        return [column]

    def known(self, names: Sequence[str]) -> bool:
        """See `RowPreparation`."""
        return is_raw_for(self._task.key, names)

    def known_forms(self) -> str:
        """See `RowPreparation`."""
        return known_task_forms(self._task.key)

    def tokenize(
        self, dataset: Dataset | IterableDataset, name: str, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[Dataset, str]:
        """See `RowPreparation`. Rows for evaluation are masked once."""
        if isinstance(dataset, IterableDataset):
            raise InputError(
                f"{name} is a stream of raw rows for {self._task.name}, which would be read twice: "
                "give a Dataset, or tokenize the stream first"
            )
        if name == PREDICTED:
            for column in self._unknown_labels(dataset.column_names):
                dataset = dataset.add_column(column, [None] * len(dataset))
        self._check_packing(name)
        how = self._tokens(tokenizer)
        try:
            found, line = tokenize_task_rows(
                self._task, self._config, dataset, tokenizer, how, keep=WEIGHTS
            )
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        given = found["labels"] if "labels" in found.column_names else [0]
        if name == "train_dataset" and not self.args.alpha and all(map(_is_none, given)):
            raise InputError(
                f"no row of {name} has a label, and with alpha=0 there is nothing else to learn: "
                "give rows with labels, or a teacher and a larger alpha"
            )
        return self.tokenized(found, name), f"{line}, at most {how.max_length} tokens a row"

    def tokenized(self, dataset: Any, name: str) -> Any:
        """See `RowPreparation`. Rows for evaluation are masked once.

        raises: InputError for rows without token ids, and for those of a causal model where the
            student is an encoder-decoder
        """
        names = getattr(dataset, "column_names", None)
        if names is None and isinstance(dataset, list | tuple) and dataset:
            names = list(dataset[0]) if isinstance(dataset[0], Mapping) else None
        if self._own_collator or names is None or "labels" in names:
            return dataset
        if "input_ids" not in names:
            raise self.unknown(name, names)
        if self._task.key == Seq2SeqLM.key:
            if name == PREDICTED:
                return dataset  # their targets may be unknown
            raise InputError(
                f"{name} has the columns {', '.join(names)}, as for a causal model, but the "
                "student is an encoder-decoder: its rows need labels, the ids of the target text"
            )
        if self._task.key != MaskedLM.key or not name.startswith((EVALUATED, PREDICTED)):
            return dataset
        if isinstance(dataset, list | tuple):
            dataset = Dataset.from_list(list(dataset))
        if not isinstance(dataset, Dataset):
            return dataset
        # Other masks at each evaluation would change its figures.
        return mask_rows(
            dataset,
            self._tokenizer(name),
            probability=self.args.mlm_probability,
            seed=self.args.seed,
        )

    def collator(self) -> Any:
        """See `RowPreparation`; None where there is no tokenizer to pad with."""
        if self.tokenizer is None:
            self.tokenizer = local_tokenizer(self._model_name)
        if not isinstance(self.tokenizer, PreTrainedTokenizerBase):
            return None
        return TaskCollator(
            self._task.key,
            self.tokenizer,
            probability=self.args.mlm_probability,
            seed=self.args.seed,
        )

    def _check_packing(self, name: str) -> None:
        for option in ("packing", "completion_only_loss", "assistant_only_loss"):
            if getattr(self.args, option):
                raise InputError(
                    f"{option} is True, but {name} is for {self._task.name}: leave it out, since "
                    "it is for causal language models only"
                )

    def _tokens(self, tokenizer: PreTrainedTokenizerBase) -> TaskTokens:
        asks = self._task.key == QuestionAnswering.key
        usual = WINDOW_LENGTH if asks else DEFAULT_MAX_LENGTH
        length = self._length("max_length", usual, tokenizer)
        stride = self.args.doc_stride
        return TaskTokens(
            max_length=length,
            max_target_length=self._length("max_target_length", TARGET_LENGTH, tokenizer),
            prefix=self.args.source_prefix,
            source_lang=self.args.source_lang,
            target_lang=self.args.target_lang,
            stride=length // 3 if stride is None else stride,
        )

    def _length(self, option: str, usual: int, tokenizer: PreTrainedTokenizerBase) -> int:
        """The value of an option; by default the usual one, or what student and tokenizer take."""
        wanted, limit = getattr(self.args, option), self._positions
        if wanted is None:
            limits = (tokenizer.model_max_length, usual if limit is None else limit)
            return min(usual, *limits)
        if limit is not None and wanted > limit:
            raise InputError(
                f"{option} is {wanted}, but the student takes {limit} tokens: set it to at most "
                f"{limit}"
            )
        return wanted


def _is_none(label: Any) -> bool:
    """Whether a label of a row says that there is none."""
    if isinstance(label, list):
        return bool(label) and all(map(_is_none, label))
    return bool(label == IGNORE or label != label)
