"""Trainers of the tests of on-policy rows, and their objective once more, target by target."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from oracle import probabilities
from torch import Tensor
from trainer_setup import arguments, collate, make_rows, small_model, weights

from hf_distill import DistillationTrainer

RATE = 0.25  # of one step of SGD, by which its gradient is found in the weights


class Watching(DistillationTrainer):
    """Keeps the batches of each step as they were trained on."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, counts = super().get_batch_samples(*args, **kwargs)
        self.seen = [*getattr(self, "seen", []), *({**batch} for batch in batches)]
        return batches, counts


def make(folder: Path, kind: Any = Watching, rows: Any = None, **options: Any) -> Any:
    fixed: dict[str, Any] = {"max_new_tokens": 6, "prompt_tokens": 3, "learning_rate": 1e-2}
    teacher, model = options.pop("teacher", small_model(1)), options.pop("model", small_model(0))
    collator = options.pop("data_collator", collate)
    names = [name for name in ("processing_class", "eval_dataset") if name in options]
    passed = {name: options.pop(name) for name in names}
    return kind(
        model,
        teacher,
        arguments(folder, **(fixed | {"train_sampling_strategy": "sequential"} | options)),
        train_dataset=make_rows(8, 0) if rows is None else rows,
        data_collator=collator,
        **passed,
    )


def written_rows(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of padded batches as a data set."""
    found = []
    for batch in batches:
        weight = batch.get("ce_weight", torch.ones(len(batch["input_ids"])))
        for ids, labels, mask, one in zip(
            batch["input_ids"], batch["labels"], batch["attention_mask"], weight, strict=True
        ):
            keep = mask.bool()
            found.append(
                {"input_ids": ids[keep].tolist(), "labels": labels[keep].tolist(),
                 "ce_weight": float(one)}
            )  # fmt: skip
    return found


def one_step(folder: Path, **options: Any) -> tuple[list[dict[str, Any]], Any, dict[str, Tensor]]:
    """The rows of one step of SGD over 8 rows, its log, and the gradient of its loss."""
    fixed = {"max_steps": 1, "optim": "sgd", "learning_rate": RATE, "max_grad_norm": 0.0}
    fixed |= {"lr_scheduler_type": "constant", "per_device_train_batch_size": 8}
    trainer = make(folder, **(fixed | options))
    before = {name: value.clone() for name, value in weights(trainer).items()}
    trainer.train()
    after = weights(trainer)
    gradient = {name: (before[name] - after[name]) / RATE for name in before}
    return written_rows(trainer.seen), trainer.state.log_history[0], gradient


# A loss of one target, for student and teacher probabilities (V,) float64 and the label.
Loss = Callable[[Tensor, Tensor, int], Tensor]


def by_hand(
    student: Any,
    rows: list[dict[str, Any]],
    judge: Callable[[dict[str, Any]], tuple[Any, Loss]],
    *,
    alpha: float = 1.0,
    temperature: float = 1.0,
    shared: int | None = None,
    seen_by_teacher: Callable[[dict[str, Any]], list[int]] = lambda row: row["input_ids"],
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of some rows in float64, each row by itself and each target in a loop.

    judge: the teacher of a row and the divergence to it
    seen_by_teacher: the ids that the teacher reads, which end as those of the student
    """
    student = copy.deepcopy(student).double()
    total: dict[str, Any] = {"ce": 0.0, "divergence": 0.0}
    counts = {"ce": 0, "divergence": 0}
    for row in rows:
        teacher, loss = judge(row)
        ids, theirs = row["input_ids"], seen_by_teacher(row)
        later = len(theirs) - len(ids)
        z = student(input_ids=torch.tensor([ids])).logits[0]
        with torch.no_grad():
            w = copy.deepcopy(teacher).double()(input_ids=torch.tensor([theirs])).logits[0]
        for at in range(len(ids) - 1):
            label = row["labels"][at + 1]
            if label == -100:
                continue
            if row["ce_weight"]:
                total["ce"] = total["ce"] - probabilities(z[at], 1.0)[label].log()
                counts["ce"] += 1
            q = probabilities(z[at, :shared], temperature)
            p = probabilities(w[at + later, :shared], temperature)
            total["divergence"] = total["divergence"] + loss(q, p, label)
            counts["divergence"] += 1
    loss_value = alpha * temperature**2 * total["divergence"] / max(1, counts["divergence"])
    loss_value = loss_value + (1 - alpha) * total["ce"] / max(1, counts["ce"])
    loss_value.backward()
    gradient = {n: p.grad.float() for n, p in student.named_parameters() if p.grad is not None}
    return loss_value.item(), gradient


def check_step(
    log: Any, gradient: dict[str, Tensor], expected: tuple[float, dict[str, Tensor]]
) -> None:
    """A step of the trainer beside what was computed by hand."""
    loss, by_name = expected
    assert abs(log["loss"] - loss) < 1e-4 + 1e-4 * abs(loss)
    assert len(by_name) > 4
    for name, value in by_name.items():
        torch.testing.assert_close(gradient[name], value, rtol=2e-3, atol=2e-5)
