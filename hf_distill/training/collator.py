"""The collator around the user's: checks rows on the CPU, attaches weights and target index."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase, TrainerCallback

from hf_distill.data import TEACHER_PROMPT_IDS, TaskCollator
from hf_distill.errors import InputError, warn_once
from hf_distill.losses.targets import IGNORE, WEIGHTS
from hf_distill.models.vocabulary import known_ids
from hf_distill.recordings.collator import RecordingCollator
from hf_distill.recordings.row_format import Header, tokenizer_hash
from hf_distill.tasks import TARGET_INDEX, Seq2SeqLM, Task
from hf_distill.training.loss import DistillationLoss
from hf_distill.training.target_index import TargetIndex


@dataclass
class CheckingCollator:
    """Wraps a collator with checks.

    On a GPU, an unknown token id or label would abort the process without a message, and a check
    there would wait for the device. Here, on the CPU and in the workers, the check is free.

    collator: rows to a padded batch
    task: decides which positions are targets
    embeddings: by role, how many ids each model can read; the student comes first
    outcomes: how many outcomes the student predicts
    end_of_text: the tokenizer's end-of-text token where it is also its padding token
    indexed: attach the index of the targets (`training.target_index`); False where batches are
        joined or cut after the collator
    weighted: the columns of weights that some rows have. Every batch then gets them; otherwise a
        step's mean would be over the targets of some micro-batches only
    raises: InputError naming the id
    """

    collator: Callable[[list[Any]], dict[str, Any]]
    task: Task
    embeddings: Mapping[str, int]
    outcomes: int
    end_of_text: int | None = None
    indexed: bool = True
    weighted: frozenset[str] = frozenset()
    _said: set[str] = field(default_factory=set)

    @property
    def known_ids(self) -> int:
        """How many ids a checked batch may hold."""
        return min(self.embeddings.values())

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        given = [name for name in WEIGHTS if name in self.weighted or _any_has(rows, name)]
        prompts = [TEACHER_PROMPT_IDS] if _any_has(rows, TEACHER_PROMPT_IDS) else []
        taken = given + prompts
        plain = [_without(row, taken) for row in rows] if taken else list(rows)
        batch = self.collator(plain)
        for name in given:
            batch[name] = _weights(name, rows, batch)
        for name in prompts:
            batch[name] = [_ids(row.get(name)) for row in rows]
        index = self.check(batch)
        if self.indexed and index is not None:
            batch[TARGET_INDEX] = TargetIndex(index)
        return batch

    def check(self, batch: Any) -> Tensor | None:
        """Refuse ids and labels that a model lacks; set padding to a token that all models have.

        returns: the index of the targets (`Task.target_index`), None for a batch without labels
        """
        ids, labels, mask = (batch.get(k) for k in ("input_ids", "labels", "attention_mask"))
        mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if isinstance(ids, Tensor):
            for role, rows in self.embeddings.items():
                ids = known_ids(ids, mask, rows, f"the {role}")
            batch["input_ids"] = ids
        if not self.task.has_labels(batch):
            return None
        targets = self.task.targets(batch)
        self.task.check(batch, targets, self.outcomes)
        if isinstance(labels, Tensor) and self.task.aligned:
            self._look_at_padding(ids, labels, mask)
        if isinstance(labels, Tensor) and isinstance(self.task, Seq2SeqLM):
            self._look_for_copies(ids, labels)
        return targets.index

    def _look_at_padding(self, ids: Any, labels: Tensor, mask: Tensor | None) -> None:
        if mask is not None and mask.shape == labels.shape:
            if bool(((mask == 0) & (labels != IGNORE)).any()):
                self._say(
                    "The labels include padding, as after labels = input_ids.clone(). It is left "
                    "out of the loss: set labels to -100 where attention_mask is 0."
                )
            if isinstance(ids, Tensor) and self.end_of_text is not None:
                self._look_for_masked_ends(ids, labels, mask)

    def _look_for_copies(self, ids: Any, labels: Tensor) -> None:
        """Warn of labels that equal the inputs: an encoder-decoder would learn to copy."""
        if not isinstance(ids, Tensor) or ids.shape != labels.shape:
            return
        if bool(((labels == ids) | (labels == IGNORE)).all()):
            self._say(
                "The labels equal the inputs, as in rows of a causal model, so the encoder-decoder "
                "would learn to copy its source: give the target text as labels."
            )

    def _look_for_masked_ends(self, ids: Tensor, labels: Tensor, mask: Tensor) -> None:
        """Warn of collators that mask real end-of-text tokens together with padding."""
        ends = (ids == self.end_of_text) & (mask != 0)
        learnt_before = torch.nn.functional.pad(labels[:, :-1] != IGNORE, (1, 0))
        if bool((ends & learnt_before).any()) and not bool((ends & (labels != IGNORE)).any()):
            self._say(
                "The padding token is the end-of-text token, and the labels mask both, so the "
                "student does not learn to stop: give the tokenizer a separate padding token, or "
                "mask by attention_mask (hf_distill.data.collator does)."
            )

    def _say(self, message: str) -> None:
        worker = get_worker_info()
        if message not in self._said and (worker is None or worker.id == 0):
            warn_once(message)
        self._said.add(message)


class EpochOfMasks(TrainerCallback):
    """Sets the epoch of a collator, on which the masks of masked language modelling depend."""

    def __init__(self, collator: TaskCollator) -> None:
        self._collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before the first batch of the epoch is made, or the first one after a resume."""
        self._collator.set_epoch(int(state.epoch + 1e-6), args.seed)


def checking_collator(
    trainer: Any, loss: DistillationLoss, recorded: Header | None
) -> CheckingCollator:
    """The trainer's collator, wrapped to read recordings and to check rows against the models.

    recorded: what the rows' recordings look like, None where they have none
    """
    student, teacher = loss.student, loss.teacher
    tokenizer, collator = trainer.processing_class, trainer.data_collator
    if isinstance(collator, TaskCollator):
        trainer.add_callback(EpochOfMasks(collator))
    if recorded is not None:
        known = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None
        expected = replace(recorded, tokenizer=tokenizer_hash(known))
        mixed = trainer.args.mixed_recordings
        collator = RecordingCollator(collator, expected, mixed=mixed, task=loss.task)
    end = getattr(tokenizer, "eos_token_id", None)
    shared_end = end if end == getattr(tokenizer, "pad_token_id", None) else None
    embeddings = {"student": student.embedding_rows}
    # If a subclass makes the teacher's inputs, their ids are not those of the batch.
    if teacher is not None and not trainer.overrides("teacher_inputs"):
        reads = getattr(teacher, "reads", student.embedding_rows)
        if reads < student.embedding_rows:
            embeddings[f"teacher {teacher.name!r}"] = reads
    # accelerate's dispatcher joins batches and cuts the result.
    apart = trainer.accelerator.dispatch_batches is False
    held_out = trainer.eval_dataset
    others = held_out.values() if isinstance(held_out, Mapping) else [held_out]
    return CheckingCollator(
        collator,
        loss.task,
        embeddings,
        student.outcomes,
        shared_end,
        indexed=apart,
        weighted=weight_columns(trainer.train_dataset, *others),
    )


def weight_columns(*datasets: Any) -> frozenset[str]:
    """The columns of weights in some data sets; lists are looked through."""
    found: set[str] = set()
    for dataset in datasets:
        names = getattr(dataset, "column_names", None)
        rows = dataset if isinstance(dataset, list | tuple) else ()
        found |= {name for name in WEIGHTS if name in (names or ()) or _any_has(rows, name)}
    return frozenset(found)


def _any_has(rows: Sequence[Any], name: str) -> bool:
    return any(isinstance(row, Mapping) and row.get(name) is not None for row in rows)


def _without(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def _weights(name: str, rows: Sequence[Any], batch: Mapping[str, Any]) -> Tensor:
    """(rows,) float32; a row without the column counts 1."""
    given = [1.0 if row.get(name) is None else row[name] for row in rows]
    values = [_number(value) for value in given]
    wrong = [value for value, number in zip(given, values, strict=True) if not number >= 0]
    if wrong:
        raise InputError(
            f"{name} is {wrong[0]!r} in a row, but must be a number of at least 0, one for each row"
        )
    size = len(next(iter(batch.values())))
    if size != len(rows):
        raise InputError(
            f"the rows have a column {name!r}, but the collator made {size} rows of {len(rows)}: "
            "use a collator that keeps rows apart"
        )
    return torch.tensor(values, dtype=torch.float32)


def _number(value: Any) -> float:
    """A number, also of numpy or torch as in a formatted data set; NaN for anything else."""
    if isinstance(value, str) or getattr(value, "ndim", 0) > 0:
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _ids(value: Any) -> list[int] | None:
    """The ids of a cell in any format; None for an empty cell."""
    return None if value is None else np.asarray(value).tolist()
