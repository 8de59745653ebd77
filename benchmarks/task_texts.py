"""Translation and summarisation in benchmarks/tasks.py: baseline, tokens, sequences, and both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from task_results import BASELINE, TEACHER, Results
from task_training import Place, accelerator, by_length, kept, named, quiet, steps_of, train
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_distill import Seq2SeqDistillationTrainer, annotate, evaluate_student, student_from_teacher
from hf_distill.data import read_source_target, tokenize_source_target
from hf_distill.models import model_from_config, train_tokenizer
from hf_distill.tasks import Seq2SeqLM

# Whether a model learns from the teacher's distributions, and whether from texts that it wrote.
METHODS = {
    BASELINE: (False, False),
    "token": (True, False),
    "sequence": (False, True),
    "token+sequence": (True, True),
}


@dataclass(frozen=True)
class Plan:
    """The settings of a task whose targets are texts.

    train, valid: files, in this order; metric: the one shown first
    config: of the teacher, which starts from random weights
    layers: of the teacher that the student starts from
    beams: with which the teacher writes the targets of the sequence-level students. All models
        are evaluated with greedy search
    """

    train: tuple[str, ...]
    valid: tuple[str, ...]
    metric: str
    max_source_length: int
    max_target_length: int
    vocab_size: int
    config: Mapping[str, Any]
    layers: Mapping[str, Any]
    teacher_epochs: float
    epochs: float
    columns: Mapping[str, str] | None = None
    teacher_learning_rate: float = 1e-3
    learning_rate: float = 5e-4
    batch_size: int = 64
    alpha: float = 0.9
    temperature: float = 1.0
    beams: int = 1
    methods: tuple[str, ...] = field(default=tuple(METHODS))

    @property
    def of_teacher(self) -> dict[str, Any]:
        left_out = {"valid", "metric", "layers", "epochs", "learning_rate", "alpha", "temperature"}
        left_out |= {"beams", "methods"}
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    def of_student(self, method: str) -> dict[str, Any]:
        tokens, texts = METHODS[method]
        left_out = {"methods"}
        left_out |= set() if tokens else {"alpha", "temperature"}
        left_out |= set() if texts else {"beams"}
        return {name: value for name, value in asdict(self).items() if name not in left_out}


def transformer(width: int, layers: tuple[int, int], positions: int) -> dict[str, Any]:
    """The config of a small Marian model. layers: of encoder and decoder"""
    found: dict[str, Any] = {"model_type": "marian", "d_model": width, "scale_embedding": True}
    found |= {"max_position_embeddings": positions, "dropout": 0.1}
    for side, number in zip(("encoder", "decoder"), layers, strict=True):
        found |= {f"{side}_layers": number, f"{side}_ffn_dim": 4 * width}
        found |= {f"{side}_attention_heads": width // 48}
    return found


PLANS = {
    "translation": Plan(
        ("mt/tatoeba_en_es/train.jsonl.xz",),
        ("mt/tatoeba_en_es/valid.jsonl.gz",),
        "bleu",
        max_source_length=48,
        max_target_length=48,
        vocab_size=4000,
        config=transformer(192, (2, 2), 64),
        layers={"encoder": [0], "decoder": [0]},
        teacher_epochs=4,
        epochs=1,
        columns={"source": "translation.en", "target": "translation.es"},
    ),
    "summarization": Plan(
        ("summ/scitldr/train.jsonl.gz", "summ/mts_dialog/train.jsonl.gz"),
        ("summ/scitldr/dev.jsonl.gz", "summ/mts_dialog/valid.jsonl.gz"),
        "rougeL",
        max_source_length=128,
        max_target_length=64,
        vocab_size=4000,
        config=transformer(192, (3, 2), 320),
        layers={"encoder": [0], "decoder": [0]},
        teacher_epochs=16,
        epochs=3,
        batch_size=16,
    ),
}


class Task:
    """One data set: its rows, its teacher, and the students of a plan."""

    def __init__(self, name: str, plan: Plan, place: Place) -> None:
        self.name, self.plan, self.place = name, plan, place
        with quiet():
            self.rows, self.valid = self._texts(plan.train), self._texts(plan.valid)

    def _texts(self, files: Iterable[str]) -> Dataset:
        read = [read_source_target(self.place.rows(f), self.plan.columns) for f in files]
        return concatenate_datasets(read)

    def run(self, results: Results, seeds: list[int]) -> None:
        """One teacher, and a student of each method for each seed."""
        plan, identity = self.plan, {"task": self.name, "model": TEACHER, "seed": 0}
        self.teacher, self.tokenizer = self._teacher()
        self.tokens = self._tokens(self.rows)
        self.held_out = by_length(self._tokens(self.valid))
        results.add(
            identity | {"settings": plan.of_teacher},
            plan.metric,
            lambda: self.figures(self.teacher),
        )
        for seed in seeds:
            for method in plan.methods:
                identity = {"task": self.name, "model": method, "seed": seed}
                results.add(
                    identity | {"settings": plan.of_student(method)},
                    plan.metric,
                    lambda n=seed, m=method: self.figures(self._trained(n, m)),
                )

    def _trained(self, seed: int, method: str) -> Any:
        plan, (tokens, texts) = self.plan, METHODS[method]
        return train(
            student_from_teacher(self.teacher, plan.layers),
            self._tokens(self._written()) if texts else self.tokens,
            self.tokenizer,
            seed=seed,
            steps=steps_of(plan.epochs, len(self.rows), plan.batch_size),
            batch_size=plan.batch_size,
            learning_rate=plan.learning_rate,
            teacher=self.teacher if tokens else None,
            alpha=plan.alpha if tokens else 0.0,
            temperature=plan.temperature,
            trainer=Seq2SeqDistillationTrainer,
        )

    def _written(self) -> Dataset:
        """The training rows with targets that the teacher wrote; each text is written once."""
        plan = self.plan
        generation = {"num_beams": plan.beams, "max_new_tokens": plan.max_target_length}
        folder = named(self.place.work, "written", plan.of_teacher | generation)
        with quiet():
            return annotate(
                self.rows, self.teacher, folder, tokenizer=self.tokenizer, generation=generation,
                max_source_length=plan.max_source_length, batch_size=plan.batch_size,
            )  # fmt: skip

    def _tokens(self, rows: Dataset) -> Dataset:
        plan = self.plan
        with quiet():
            return tokenize_source_target(
                rows.select_columns(["source", "target"]),
                self.tokenizer,
                max_source_length=plan.max_source_length,
                max_target_length=plan.max_target_length,
            )[0]

    def figures(self, model: Any) -> dict[str, Any]:
        """BLEU, chrF and ROUGE of texts written greedily, the perplexity, and the size."""
        with quiet():
            found = evaluate_student(
                model, None, self.held_out, self.tokenizer, batch_size=50, speed=False,
                accelerator=accelerator(),
                generate={"num_beams": 1, "max_new_tokens": self.plan.max_target_length},
            )  # fmt: skip
        names = ("bleu", "chrf", "rouge1", "rouge2", "rougeL", "perplexity", "parameters")
        return {name: found[name] for name in names}

    def _teacher(self) -> tuple[Any, Any]:
        """A model from random weights, trained on the targets; made once, with its tokenizer."""
        folder = kept(self.place.work, self.name, self.plan.of_teacher, self._teach)
        model = AutoModelForSeq2SeqLM.from_pretrained(folder)
        return model.eval(), AutoTokenizer.from_pretrained(folder)

    def _teach(self, folder: Path) -> None:
        plan = self.plan
        texts = [text for name in ("source", "target") for text in self.rows[name]]
        self.tokenizer = train_tokenizer(texts, plan.vocab_size, task=Seq2SeqLM.key)
        model = model_from_config(plan.config, self.tokenizer, seed=0, task=Seq2SeqLM.key)
        model = train(
            model, self._tokens(self.rows), self.tokenizer, seed=0,
            steps=steps_of(plan.teacher_epochs, len(self.rows), plan.batch_size),
            batch_size=plan.batch_size, learning_rate=plan.teacher_learning_rate,
            trainer=Seq2SeqDistillationTrainer,
        )  # fmt: skip
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
