"""Extractive question answering in benchmarks/tasks.py."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from task_results import BASELINE, TEACHER, Results
from task_training import Place, accelerator, kept, quiet, steps_of, train
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, set_seed

from hf_distill import evaluate_student, student_from_teacher
from hf_distill.data import read_questions, tokenize_questions


@dataclass(frozen=True)
class Plan:
    """The settings of question answering; baseline and student differ in alpha only.

    held_out: share of the contexts whose questions are for evaluation
    """

    files: tuple[str, ...] = ("qa/xquad/xquad.en.jsonl.gz",)
    held_out: float = 0.25
    max_length: int = 256
    stride: int = 64
    teacher_epochs: float = 8
    epochs: float = 3
    teacher_learning_rate: float = 2e-4
    learning_rate: float = 3e-4
    batch_size: int = 16
    layers: Any = "first_and_last"
    num_layers: int = 3
    alpha: float = 0.9
    temperature: float = 2.0

    @property
    def of_teacher(self) -> dict[str, Any]:
        left_out = ("epochs", "learning_rate", "layers", "num_layers", "alpha", "temperature")
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    def of_student(self, alpha: float) -> dict[str, Any]:
        found = asdict(self) | {"alpha": alpha}
        if not alpha:
            del found["temperature"]
        return found


class Task:
    """The questions, their teacher, and the students of a plan."""

    def __init__(self, name: str, plan: Plan, place: Place) -> None:
        self.name, self.plan, self.place = name, plan, place
        self.encoder = place.minilm()
        self.tokenizer = AutoTokenizer.from_pretrained(self.encoder)
        with quiet():
            rows = concatenate_datasets([read_questions(place.rows(f)) for f in plan.files])
            train_rows, self.valid = split(rows, plan.held_out)
            self.rows, self.windows = self._tokens(train_rows), self._tokens(self.valid)

    def _tokens(self, rows: Dataset) -> Dataset:
        plan = self.plan
        return tokenize_questions(
            rows, self.tokenizer, max_length=plan.max_length, stride=plan.stride
        )[0]

    def run(self, results: Results, seeds: list[int]) -> None:
        """One teacher, and a baseline and a student for each seed."""
        plan, identity = self.plan, {"task": self.name, "model": TEACHER, "seed": 0}
        teacher = self._teacher()
        results.add(identity | {"settings": plan.of_teacher}, "f1", lambda: self.figures(teacher))
        for seed in seeds:
            for model, alpha in ((BASELINE, 0.0), ("distilled", plan.alpha)):
                identity = {"task": self.name, "model": model, "seed": seed}
                results.add(
                    identity | {"settings": plan.of_student(alpha)},
                    "f1",
                    lambda n=seed, a=alpha: self.figures(self._trained(teacher, n, a)),
                )

    def _trained(self, teacher: Any, seed: int, alpha: float) -> Any:
        plan = self.plan
        return train(
            student_from_teacher(teacher, plan.layers, num_layers=plan.num_layers),
            self.rows, self.tokenizer, seed=seed, alpha=alpha, temperature=plan.temperature,
            teacher=teacher if alpha else None,
            steps=steps_of(plan.epochs, len(self.rows), plan.batch_size),
            batch_size=plan.batch_size, learning_rate=plan.learning_rate,
        )  # fmt: skip

    def figures(self, model: Any) -> dict[str, Any]:
        """Exact match and F1, 0 to 100, and the size."""
        with quiet():
            found = evaluate_student(
                model, None, self.windows, self.tokenizer, references=self.valid, batch_size=16,
                speed=False, accelerator=accelerator(),
            )  # fmt: skip
        return {name: found[name] for name in ("f1", "exact_match", "ce", "parameters")}

    def _teacher(self) -> Any:
        folder = kept(self.place.work, self.name, self.plan.of_teacher, self._teach)
        return AutoModelForQuestionAnswering.from_pretrained(folder).eval()

    def _teach(self, folder: Path) -> None:
        plan = self.plan
        set_seed(0)  # of the new head
        train(
            AutoModelForQuestionAnswering.from_pretrained(self.encoder),
            self.rows, self.tokenizer, seed=0,
            steps=steps_of(plan.teacher_epochs, len(self.rows), plan.batch_size),
            batch_size=plan.batch_size, learning_rate=plan.teacher_learning_rate,
        ).save_pretrained(folder)  # fmt: skip


def split(rows: Dataset, held_out: float) -> tuple[Dataset, Dataset]:
    """Rows to train and to evaluate on, without a context in both; the same at each call."""
    contexts = sorted(set(rows["context"]))
    chosen = set(random.Random(0).sample(contexts, round(held_out * len(contexts))))
    places: tuple[list[int], list[int]] = ([], [])
    for place, context in enumerate(rows["context"]):
        places[context in chosen].append(place)
    return rows.select(places[0]), rows.select(places[1])
