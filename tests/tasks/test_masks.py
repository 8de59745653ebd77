"""The masks of masked language modelling in training: by seed, epoch and row, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from task_models import make_model
from task_text import word_pieces
from trainer_setup import arguments

from hf_distill import DistillationTrainer
from hf_distill.data import TaskCollator

ROWS = [{"input_ids": [2, *(5 + (n * k) % 18 for k in range(1, 12)), 3]} for n in range(1, 13)]
TASK = "masked-lm"


class Seen(DistillationTrainer):
    """Keeps the ids and labels of each step's batches."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        found = super().get_batch_samples(*args, **kwargs)
        batches = [(b["input_ids"].tolist(), b["labels"].tolist()) for b in found[0]]
        self.steps = {**getattr(self, "steps", {}), self.state.global_step: batches}
        return found


def trainer(folder: Path, model: Any = None, steps: int = 8, **options: Any) -> Seen:
    """4 steps an epoch, with dropout."""
    options = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 5} | options
    args = arguments(folder, max_steps=steps, per_device_train_batch_size=3, **options)
    collate = TaskCollator(TASK, word_pieces(), probability=0.4, seed=7)
    student = model or make_model("Bert", TASK, 0, hidden_dropout_prob=0.1).train()
    return Seen(
        student, make_model("Bert", TASK, 1), args, train_dataset=ROWS,
        processing_class=word_pieces(), data_collator=collate,
    )  # fmt: skip


def test_masks_are_the_same_after_a_resume(tmp_path: Path) -> None:
    """In the middle of the second epoch, although batches are drawn ahead of the steps."""
    whole = trainer(tmp_path / "whole")
    whole.train()
    stopped = trainer(tmp_path / "parts")
    stopped.args.max_steps = 5
    stopped.train()
    resumed = trainer(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert sorted(resumed.steps) == [5, 6, 7]
    assert resumed.steps == {step: whole.steps[step] for step in (5, 6, 7)}
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def by_row(steps: dict[int, Any], epoch: int) -> dict[tuple[int, ...], list[int]]:
    """The labels of each row in an epoch."""
    found = {}
    for step in range(4 * epoch, 4 * epoch + 4):
        for ids, labels in steps[step]:
            for row, targets in zip(ids, labels, strict=True):
                pairs = zip(row, targets, strict=True)
                found[tuple(id if t == -100 else t for id, t in pairs)] = targets
    return found


def test_other_masks_in_each_epoch_whatever_else_differs(tmp_path: Path) -> None:
    """The baseline sees the masks of the student, and workers do not matter."""
    student = trainer(tmp_path / "student")
    student.train()
    first, second = (by_row(student.steps, epoch) for epoch in (0, 1))
    assert first.keys() == second.keys()
    assert len(first) == 12
    assert sum(first[row] != second[row] for row in first) > 8
    share = sum(t != -100 for targets in first.values() for t in targets) / (12 * 11)
    assert share == pytest.approx(0.4, abs=0.15)
    baseline = trainer(tmp_path / "baseline", alpha=0.0, dataloader_num_workers=2,
                       dataloader_persistent_workers=True)  # fmt: skip
    baseline.train()
    assert baseline.steps == student.steps
