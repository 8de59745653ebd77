"""Classification in benchmarks/tasks.py: all labels, and few labels with many unlabelled rows."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, concatenate_datasets
from task_results import BASELINE, TEACHER, Results
from task_training import Place, accelerator, by_length, kept, quiet, steps_of, train
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from hf_distill import evaluate_student, load_recording, record, student_from_teacher
from hf_distill.data import Labels, TaskCollator, read_labelled, tokenize_labelled
from hf_distill.tasks import SequenceClassification

MAX_LENGTH = 128  # tokens; the longest text has 98
MEASURED = 256  # rows, for layers by influence


@dataclass(frozen=True)
class Plan:
    """The settings of a classification task; baseline and student differ in alpha only.

    initial: whose layers the student starts from, the teacher's or the encoder's before it was
        fine-tuned, with a new head
    labels_per_class: rows that keep their label; None for all. The teacher knows all labels
    copies: further copies of each training row of baseline and student, with its label and without
        a quarter of its tokens
    """

    train: str
    valid: str
    teacher_epochs: float
    epochs: float
    teacher_learning_rate: float = 3e-4
    learning_rate: float = 3e-4
    batch_size: int = 32
    initial: Literal["teacher", "encoder"] = "teacher"
    layers: Any = "first_and_last"
    num_layers: int = 3
    alpha: float = 0.9
    temperature: float = 2.0
    labels_per_class: int | None = None
    copies: int = 0

    @property
    def of_teacher(self) -> dict[str, Any]:
        names = ("train", "teacher_epochs", "teacher_learning_rate", "batch_size")
        return {name: getattr(self, name) for name in names}

    def of_student(self, alpha: float) -> dict[str, Any]:
        found = asdict(self) | {"alpha": alpha}
        if not self.copies:  # as rows that were measured before have it
            del found["copies"]
        if not alpha:
            del found["temperature"]
        return found


BANKING77 = Plan(
    "cls/banking77/train.jsonl.gz", "cls/banking77/test.jsonl.gz", teacher_epochs=4, epochs=1
)
RT_POLARITY = Plan(
    "cls/rt_polarity/train.jsonl.gz",
    "cls/rt_polarity/valid.jsonl.gz",
    teacher_epochs=2,
    epochs=1,
    teacher_learning_rate=1e-4,
    learning_rate=1e-4,
)
PLANS = {
    "banking77": BANKING77,
    "rt_polarity": RT_POLARITY,
    "banking77-copies": replace(BANKING77, initial="encoder", copies=3),
    "rt_polarity-copies": replace(RT_POLARITY, layers=[0, 1, 2], copies=3, learning_rate=2e-4),
    "banking77-few": replace(BANKING77, labels_per_class=10),
    "rt_polarity-few": replace(RT_POLARITY, labels_per_class=10),
}


class Task:
    """One data set: its rows, its teacher, and the students of a plan."""

    def __init__(self, name: str, plan: Plan, place: Place) -> None:
        self.name, self.plan, self.place = name, plan, place
        self.encoder = place.minilm()
        self.tokenizer = AutoTokenizer.from_pretrained(self.encoder)
        with quiet():
            self.originals, self.labels = self._tokens(plan.train)
            self.rows = with_copies(self.originals, plan.copies)
            self.valid = by_length(self._tokens(plan.valid, self.labels)[0])

    def _tokens(self, file: str, labels: Labels | None = None) -> tuple[Dataset, Labels]:
        rows, labels = read_labelled(self.place.rows(file), labels=labels)
        return tokenize_labelled(rows, self.tokenizer, max_length=MAX_LENGTH)[0], labels

    def run(self, results: Results, seeds: list[int]) -> None:
        """One teacher, and a baseline and a student for each seed."""
        plan, identity = self.plan, {"task": self.name, "model": TEACHER, "seed": 0}
        results.add(
            identity | {"settings": plan.of_teacher}, "accuracy", lambda: self.figures(self.teacher)
        )
        for seed in seeds:
            for model, alpha in ((BASELINE, 0.0), ("distilled", plan.alpha)):
                identity = {"task": self.name, "model": model, "seed": seed}
                results.add(
                    identity | {"settings": plan.of_student(alpha)},
                    "accuracy",
                    lambda n=seed, a=alpha: self.figures(self._trained(n, a)),
                )

    def _trained(self, seed: int, alpha: float) -> Any:
        plan = self.plan
        return train(
            self._initial(seed), self._rows_of(seed, alpha), self.tokenizer,
            seed=seed, alpha=alpha, temperature=plan.temperature,
            steps=steps_of(plan.epochs, len(self.rows), plan.batch_size),
            batch_size=plan.batch_size, learning_rate=plan.learning_rate,
        )  # fmt: skip

    def _initial(self, seed: int) -> Any:
        plan = self.plan
        set_seed(seed)  # of a new head
        return student_from_teacher(
            self.teacher if plan.initial == "teacher" else self._untrained(),
            plan.layers,
            num_layers=None if isinstance(plan.layers, list) else plan.num_layers,
            rows=self.rows.select(range(MEASURED)) if plan.layers == "influence" else None,
        )

    def _rows_of(self, seed: int, alpha: float) -> Dataset:
        """What a student is trained on. Rows without a label are of no use to the baseline."""
        number = self.plan.labels_per_class
        rows = self.recorded(labelled=True) if alpha else self.rows
        if number is None:
            return rows
        few = few_of_each(self.rows["labels"], number, seed)
        if not alpha:
            return rows.select(few)
        rest = sorted(set(range(len(rows))) - set(few))
        unlabelled = self.recorded(labelled=False).select(rest)
        return concatenate_datasets([rows.select(few), unlabelled])

    def figures(self, model: Any) -> dict[str, Any]:
        """Accuracy and macro F1 on the held-out rows, 0 to 1, and the size."""
        with quiet():
            found = evaluate_student(
                model, None, self.valid, self.tokenizer, batch_size=32, speed=False,
                accelerator=accelerator(),
            )  # fmt: skip
        return {name: found[name] for name in ("accuracy", "macro_f1", "ce", "parameters")}

    @property
    def teacher(self) -> Any:
        """The whole encoder, fine-tuned on all labels; made once."""
        folder = kept(self.place.work, "classification", self.plan.of_teacher, self._teach)
        return AutoModelForSequenceClassification.from_pretrained(folder).eval()

    def _untrained(self) -> Any:
        names = self.labels.names
        return AutoModelForSequenceClassification.from_pretrained(
            self.encoder,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
        )

    def _teach(self, folder: Path) -> None:
        plan = self.plan
        set_seed(0)
        train(
            self._untrained(), self.originals, self.tokenizer, seed=0,
            steps=steps_of(plan.teacher_epochs, len(self.originals), plan.batch_size),
            batch_size=plan.batch_size, learning_rate=plan.teacher_learning_rate,
        ).save_pretrained(folder)  # fmt: skip

    def recorded(self, *, labelled: bool) -> Dataset:
        """The training rows with the teacher's distributions; without labels these are -100."""

        def make(folder: Path) -> None:
            rows = self.rows
            if not labelled:
                rows = rows.remove_columns("labels").add_column("labels", [-100] * len(rows))
                rows = rows.cast(self.rows.features)
            with quiet():
                record(
                    rows, self.teacher, folder, kind="full", tokenizer=self.tokenizer,
                    data_collator=TaskCollator(SequenceClassification.key, self.tokenizer),
                    batch_size=32, accelerator=accelerator(),
                )  # fmt: skip

        name, settings = "labelled" if labelled else "unlabelled", self.plan.of_teacher
        settings |= {"copies": self.plan.copies} if self.plan.copies else {}
        return load_recording(kept(self.place.work, name, settings, make))


def with_copies(rows: Dataset, copies: int) -> Dataset:
    """The rows, and copies of each without a quarter of the tokens between first and last."""
    draw = random.Random(0)

    def shorter(row: dict[str, Any]) -> dict[str, Any]:
        end = len(row["input_ids"]) - 1
        places = [0, *(place for place in range(1, end) if draw.random() < 0.75), end]
        return {
            name: [values[place] for place in places] if isinstance(values, list) else values
            for name, values in row.items()
        }

    made = [Dataset.from_list([*map(shorter, rows)], rows.features) for _ in range(copies)]
    return concatenate_datasets([rows, *made])


def few_of_each(labels: list[int], number: int, seed: int) -> list[int]:
    """The places of so many rows of each class, drawn by the seed, ascending."""
    places: dict[int, list[int]] = {}
    for place, label in enumerate(labels):
        places.setdefault(label, []).append(place)
    draw = random.Random(seed)
    return sorted(p for label in sorted(places) for p in draw.sample(places[label], number))
