"""One optimizer step of the real trainer for every task, against float64 by another route.

The oracle runs each row alone and unpadded, and works on probabilities, one target at a time.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import oracle
import torch
from grid import every_pair
from task_models import CLASSES, collate, make_model, make_rows
from torch import Tensor

from hf_distill import DistillationArguments, DistillationTrainer

AXES: dict[str, list[Any]] = {
    "model": [
        "Bert masked-lm",
        "T5 seq2seq-lm",
        "Bart seq2seq-lm",
        "Bert one",
        "Llama one",
        "Bert several",
        "Bert numbers",
        "Bert token-classification",
        "Bert question-answering",
    ],
    "divergence": ["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"],
    "alpha": [0.0, 0.5, 1.0],
    "temperature": [1.0, 2.0],
    "accumulation": [1, 4],
    "processes": [1, 2],
    "side": ["right", "left"],
    "unlabelled": [False, True],
}


@dataclass(frozen=True)
class Case:
    model: str
    divergence: str
    alpha: float
    temperature: float
    accumulation: int
    processes: int
    side: str
    unlabelled: bool

    def __str__(self) -> str:
        return "-".join(str(getattr(self, field.name)) for field in fields(self))

    @property
    def kind(self) -> str:
        return self.model.split()[1]

    @property
    def task(self) -> str:
        classifies = self.kind in ("one", "several", "numbers")
        return "sequence-classification" if classifies else self.kind

    @property
    def named(self) -> str:
        """The divergence, of which numbers have only one."""
        numbers = self.kind == "numbers" and self.divergence != "reverse_kl"
        return "forward_kl" if numbers else self.divergence


def cases() -> list[Case]:
    """With padding on the left some models see other rows: BART, which takes no position ids, and
    BERT where it classifies a row by its first token."""
    found = every_pair(AXES, Case)
    right = ("Bart seq2seq-lm", "Bert one", "Bert several", "Bert numbers")
    return [replace(case, side="right") if case.model in right else case for case in found]


def models(case: Case) -> tuple[Any, Any]:
    architecture = case.model.split()[0]
    problem = {
        "one": {"problem_type": "single_label_classification"},
        "several": {"problem_type": "multi_label_classification", "num_labels": 3},
        "numbers": {"num_labels": 1},
    }.get(case.kind, {})
    student, teacher = (make_model(architecture, case.task, seed, **problem) for seed in (0, 1))
    return student, teacher


def rows_of(case: Case) -> list[dict[str, Any]]:
    rows = make_rows(case.task)
    if case.task != "sequence-classification":
        return rows
    generator = torch.Generator().manual_seed(5)
    for number, row in enumerate(rows):
        if case.kind == "several":
            row["labels"] = torch.randint(0, 2, (3,), generator=generator).tolist()
        elif case.kind == "numbers":
            row["labels"] = float(torch.randn((), generator=generator))
        if case.unlabelled and number % 3 == 1:
            row["labels"] = {"one": -100, "several": [-100] * 3, "numbers": float("nan")}[case.kind]
    return rows


def distributions(case: Case, model: Any, row: dict[str, Any]) -> list[tuple[Tensor, int | None]]:
    """The logits of each target of a row, (outcomes,), and its label, None for no label."""
    ids = torch.tensor([row["input_ids"]])
    if case.kind == "seq2seq-lm":
        start = model.config.decoder_start_token_id
        before = [start, *(1 if i == -100 else i for i in row["labels"][:-1])]
        logits = model(input_ids=ids, decoder_input_ids=torch.tensor([before])).logits[0]
        return [(z, i) for z, i in zip(logits, row["labels"], strict=True) if i != -100]
    outputs = model(input_ids=ids)
    if case.kind in ("masked-lm", "token-classification"):
        return [(z, i) for z, i in zip(outputs.logits[0], row["labels"], strict=True) if i != -100]
    if case.kind == "question-answering":
        start, end = outputs.start_logits[0], outputs.end_logits[0]
        return [(start, row["start_positions"]), (end, row["end_positions"])]
    if case.kind == "one":
        return [(outputs.logits[0], None if row["labels"] == -100 else row["labels"])]
    zero = torch.zeros((), dtype=torch.float64)
    return [
        (torch.stack([zero, z]), None if label == -100 else label)
        for z, label in zip(outputs.logits[0], row["labels"], strict=True)
    ]


def expected(case: Case, student: Any, teacher: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Loss, CE and divergence, and the gradient of the loss by parameter name."""
    student, teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    total = {name: torch.zeros(()).double() for name in ("ce", "divergence")}
    targets = labelled = 0
    for row in rows_of(case):
        if case.kind == "numbers":
            ids = torch.tensor([row["input_ids"]])
            ours, theirs = student(input_ids=ids).logits[0, 0], teacher(input_ids=ids).logits[0, 0]
            total["divergence"] += (ours - theirs.detach()) ** 2 / case.temperature**2
            targets += 1
            if row["labels"] == row["labels"]:
                total["ce"] += (ours - row["labels"]) ** 2
                labelled += 1
            continue
        ours, theirs = distributions(case, student, row), distributions(case, teacher, row)
        for (z, label), (w, _) in zip(ours, theirs, strict=True):
            targets += 1
            if label is not None:
                labelled += 1
                total["ce"] -= oracle.probabilities(z, 1.0)[label].log()
            q = oracle.probabilities(z, case.temperature)
            p = oracle.probabilities(w.detach(), case.temperature)
            total["divergence"] += oracle.divergence(case.named, q, p)
    ce, divergence = total["ce"] / max(labelled, 1), total["divergence"] / targets
    loss = (1 - case.alpha) * ce + case.alpha * case.temperature**2 * divergence
    loss.backward()
    gradient = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    return {"loss": loss.item(), "ce": ce.item(), case.named: divergence.item()}, gradient


def run(case: Case, folder: Path) -> dict[str, float]:
    """One SGD step with lr 1 on all rows, then evaluation; errors against the oracle, relative."""
    student, teacher = models(case)
    values, gradient = expected(case, student, teacher)
    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    rows = rows_of(case)
    arguments = DistillationArguments(
        str(folder),
        alpha=case.alpha,
        temperature=case.temperature,
        divergence=case.named,
        beta=oracle.BETA,
        skew=oracle.SKEW,
        max_steps=1,
        per_device_train_batch_size=len(rows) // case.processes // case.accumulation or 1,
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=case.accumulation,
        train_sampling_strategy="sequential",
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = DistillationTrainer(
        student,
        teacher,
        arguments,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=lambda rows: collate(rows, case.side),
    )
    evaluated = trainer.evaluate()
    trainer.train()
    logged = trainer.state.log_history[-2]
    squares = {"error": 0.0, "size": 1e-12}
    for name, value in student.named_parameters():
        applied = before[name].double() - value.detach().double()
        truth = gradient.get(name, torch.zeros_like(applied))
        squares["error"] += (applied - truth).square().sum().item()
        squares["size"] += truth.square().sum().item()
    errors = {"gradient": (squares["error"] / squares["size"]) ** 0.5}
    for name, value in values.items():
        errors[f"eval_{name}"] = abs(evaluated[f"eval_{name}"] - value) / abs(value)
        if name in logged:  # with alpha 0 the teacher is not asked
            errors[name] = abs(logged[name] - value) / abs(value)
    return errors


__all__ = ["CLASSES", "Case", "cases", "run"]
