"""Pad the rows of other tasks than causal language modelling to a batch of tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import xxhash
from datasets import Dataset, Features, List, Value
from torch import Tensor
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from hf_distill.data.collate import collator
from hf_distill.data.masked_texts import masking_collator
from hf_distill.errors import InputError
from hf_distill.tasks import (
    CausalLM,
    MaskedLM,
    QuestionAnswering,
    Seq2SeqLM,
    SequenceClassification,
    TokenClassification,
)
from hf_distill.tasks.question_answering import ANSWER_MASK

VERSION = 1  # part of every cache key: raise it when the same settings would mask other tokens
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
SPECIAL = "special_tokens_mask"
MASKING_PROBABILITY = 0.15

Rows = Sequence[Mapping[str, Any]]


def task_collator(task: str, tokenizer: PreTrainedTokenizerBase, **masks: Any) -> Any:
    """The collator for rows of a task, by its key. masks: see `TaskCollator`"""
    if task == CausalLM.key:
        return collator(tokenizer)
    return TaskCollator(task, tokenizer, **masks)


class TaskCollator:
    """Pads rows on the right, by the collator that transformers has for the task.

    task: the `key` of a task other than causal language modelling
    tokenizer: its padding token is used, or its end-of-text token if it has none
    probability, seed: of the masks for rows of masked language modelling without `labels`. Each
        call masks other tokens, see `masking_collator`. After `set_epoch` the masks depend on seed,
        epoch and the row's ids only
    Columns that the task does not use are left out.
    raises: InputError for rows without the columns that the task needs
    """

    def __init__(
        self,
        task: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        probability: float = MASKING_PROBABILITY,
        seed: int | None = None,
    ) -> None:
        tokenizer = _padding_right(tokenizer)
        self._masked = task == MaskedLM.key
        self._tokenizer, self._probability, self._seed = tokenizer, probability, seed
        self._masks: DataCollatorForLanguageModeling | None = None  # made for rows without labels
        # In shared memory, so that workers that live for several epochs see it change.
        self._epoch = torch.tensor([-1, 0]).share_memory_() if self._masked else None
        self._labels: tuple[str, ...] = ("labels",)
        if task == Seq2SeqLM.key:
            self._pad: Callable[[Any], Any] = DataCollatorForSeq2Seq(tokenizer)
        elif task in (TokenClassification.key, MaskedLM.key):
            self._pad = DataCollatorForTokenClassification(tokenizer)
        else:
            self._pad = DataCollatorWithPadding(tokenizer)
            if task == SequenceClassification.key:
                self._labels = ("labels", "label")
            else:
                self._labels = (*QuestionAnswering.label_names, ANSWER_MASK)

    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        if self._masked and not any("labels" in row for row in rows):
            return self._mask(rows)
        plain = [_only(row, (*INPUTS, *self._labels)) for row in rows]
        allowed = [row.pop(ANSWER_MASK, None) for row in plain]
        batch = {name: value for name, value in self._pad(plain).items() if value is not None}
        if any(one is not None for one in allowed):
            batch[ANSWER_MASK] = _answer_mask(allowed, batch["attention_mask"])
        return batch

    def set_epoch(self, epoch: int, seed: int = 0) -> None:
        """From now on, draw the masks of each row from seed, epoch and its ids.

        So workers, prefetching and resuming do not change them.
        seed: used if the collator was given none
        """
        if self._epoch is not None:
            self._epoch.copy_(torch.tensor([epoch, seed if self._seed is None else self._seed]))

    def _mask(self, rows: Rows) -> dict[str, Tensor]:
        if self._masks is None:
            self._masks = masking_collator(
                self._tokenizer, probability=self._probability, seed=self._seed
            )
        if self._epoch is None or self._epoch[0] < 0:
            return dict(self._masks([_only(row, (*INPUTS, SPECIAL)) for row in rows]))
        choice = str(self._epoch.tolist()).encode()
        return dict(self._pad([self._masked_row(self._masks, row, choice) for row in rows]))

    def _masked_row(
        self, masks: DataCollatorForLanguageModeling, row: Mapping[str, Any], choice: bytes
    ) -> dict[str, Any]:
        ids, special = (row.get(name) for name in ("input_ids", SPECIAL))
        ids = torch.as_tensor(ids, dtype=torch.long)
        key = xxhash.xxh3_64_intdigest(choice + ids.numpy().tobytes())
        masks.generator = torch.Generator().manual_seed(key >> 1)
        special = None if special is None else torch.as_tensor(special)[None]
        masked, labels = masks.torch_mask_tokens(ids[None], special)
        found = {"input_ids": masked[0].tolist(), "labels": labels[0].tolist()}
        return _only(row, INPUTS) | found


def mask_rows(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    probability: float = MASKING_PROBABILITY,
    seed: int = 0,
) -> Dataset:
    """Rows with fixed masks on some of their tokens, and `labels` for the masked tokens.

    Use it for evaluation rows, so that repeated evaluations agree, and for rows to be recorded.
    rows: with `input_ids`, and perhaps `special_tokens_mask`; probability, seed: see
        `masking_collator`
    """
    masking_collator(tokenizer, probability=probability)  # checks both, once
    ids = List(Value("int32"))
    return rows.map(
        _mask_row,
        with_indices=True,
        fn_kwargs={
            "tokenizer": tokenizer,
            "probability": probability,
            "seed": seed,
            "version": VERSION,
        },
        remove_columns=rows.column_names,
        features=Features({"input_ids": ids, "labels": ids}),
        desc="mask",
    )


def _mask_row(
    row: Mapping[str, Any],
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    probability: float,
    seed: int,
    version: int,
) -> dict[str, Any]:
    mask = masking_collator(tokenizer, probability=probability, seed=seed + index)
    found = mask([_only(row, ("input_ids", SPECIAL))])
    return {name: found[name][0].tolist() for name in ("input_ids", "labels")}


def _only(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: row[name] for name in names if row.get(name) is not None}


def _answer_mask(rows: Sequence[Any], attended: Tensor) -> Tensor:
    """(rows, positions), 0 at padding; a row without one may answer everywhere."""
    mask = attended.clone()
    for row, given in enumerate(rows):
        if given is not None:
            mask[row, : len(given)] = torch.as_tensor(given, dtype=mask.dtype)
    return mask


def _padding_right(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy of it that pads on the right and has a padding token."""
    if tokenizer.pad_token is not None and tokenizer.padding_side == "right":
        return tokenizer
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise InputError("the tokenizer has neither a padding nor an end-of-text token: set one")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
