"""Turn the data sets that a trainer is given into rows of token ids: at construction and later."""

from __future__ import annotations

import inspect
from typing import Any

from torch.utils.data import DataLoader
from transformers import Trainer

from hf_distill.models.base import base_model
from hf_distill.models.from_scratch import max_positions
from hf_distill.tasks import CausalLM, find_task
from hf_distill.teachers import Teacher
from hf_distill.training.arguments import DistillationArguments
from hf_distill.training.row_preparation import EVALUATED, PREDICTED, RowPreparation
from hf_distill.training.task_row_preparation import TaskRowPreparation


class DatasetsMixin(Trainer):
    """A Trainer whose `evaluate` and `predict` also take raw rows."""

    _rows: RowPreparation

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As Trainer's; raw rows are tokenized as those of the constructor."""
        return super().get_eval_dataloader(self._prepared(eval_dataset, EVALUATED))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As Trainer's; raw rows are tokenized as those of the constructor."""
        return super().get_test_dataloader(self._prepared(test_dataset, PREDICTED))

    def _prepared(self, dataset: Any, name: str) -> Any:
        if dataset is None or isinstance(dataset, str):  # of the constructor
            return dataset
        prepared = self._rows(dataset, name)
        self._rows.report()
        return prepared


def prepare_datasets(
    args: DistillationArguments,
    student: Any,
    given: dict[str, Any],
    task: str | None = None,
    teacher: Teacher | None = None,
) -> RowPreparation:
    """Tokenize the raw data sets among a trainer's arguments, in place, and print the results.

    given: the trainer's keyword arguments; a tokenizer that was found, and a collator if there is
        none, are added to them
    task: its key, None for that of the student's class
    teacher: names the classes of a student that has no names, before labels are read by name
    returns: what tokenizes the data sets of `evaluate` and `predict` in the same way
    """
    own = given.get("data_collator") is not None
    if student is None and given.get("model_init") is not None:
        # Made an additional time, only to read its task and its config.
        init = given["model_init"]
        student = init(None) if inspect.signature(init).parameters else init()
    model = getattr(teacher, "model", None)
    if student is not None and model is not None:
        find_task(student, "student", task).check_pair(base_model(student), base_model(model))
    prepare = _preparation(args, given.get("processing_class"), student, task, own_collator=own)
    for name in ("train_dataset", EVALUATED):
        if given.get(name) is not None:
            given[name] = prepare(given[name], name)
    given["processing_class"] = prepare.tokenizer
    if not own:
        given["data_collator"] = prepare.collator()
    prepare.report()
    return prepare


def _preparation(
    args: DistillationArguments,
    tokenizer: Any,
    student: Any,
    task: str | None,
    *,
    own_collator: bool,
) -> RowPreparation:
    if student is None:  # the trainer refuses it
        return RowPreparation(args, tokenizer, None, None, own_collator=own_collator)
    found, plain = find_task(student, "student", task), base_model(student)
    if isinstance(found, CausalLM):
        limit = max_positions(plain.config)
        return RowPreparation(args, tokenizer, student, limit, own_collator=own_collator)
    return TaskRowPreparation(args, tokenizer, student, found, own_collator=own_collator)
