"""Encoder-decoders: evaluation that writes, and recordings of their teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from task_models import collate, make_model, make_rows
from task_text import RAW, word_pieces
from trainer_setup import arguments
from writing_setup import tokenizer, writer

from hf_distill import (
    DistillationTrainer,
    Seq2SeqDistillationArguments,
    Seq2SeqDistillationTrainer,
    record,
)
from hf_distill.data.masked_texts import masking_collator
from hf_distill.errors import InputError

TASK = "seq2seq-lm"


@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_the_loss_is_the_objective_while_tokens_are_written(name: str, tmp_path: Path) -> None:
    student, teacher, rows = make_model(name, TASK, 0), make_model(name, TASK, 1), make_rows(TASK)
    seen: list[Any] = []
    options = {"generation_max_length": 12, "generation_num_beams": 2, "alpha": 0.7}
    trainer = Seq2SeqDistillationTrainer(
        student,
        teacher,
        arguments(
            tmp_path, Seq2SeqDistillationArguments, predict_with_generate=True,
            per_device_eval_batch_size=3, **options,
        ),
        eval_dataset=rows,
        data_collator=collate,
        compute_metrics=lambda found: seen.append(found) or {},
    )  # fmt: skip
    plain = DistillationTrainer(
        student, teacher, arguments(tmp_path, alpha=0.7), eval_dataset=rows, data_collator=collate
    )
    found, expected = trainer.evaluate(), plain.evaluate()
    for key in ("eval_loss", "eval_ce", "eval_forward_kl", "eval_top1_agreement"):
        assert found[key] == pytest.approx(expected[key], rel=1e-6)
    for row, written in zip(rows, seen[0].predictions, strict=True):
        alone = student.generate(torch.tensor([row["input_ids"]]), max_length=12, num_beams=2)[0]
        written = torch.tensor(written)
        assert written[: len(alone)].tolist() == alone.tolist()
        assert set(written[len(alone) :].tolist()) <= {1, -100}


def test_raw_rows_in_evaluate_and_predict(tmp_path: Path) -> None:
    student = writer("t5", 0)
    options: Any = {"predict_with_generate": True, "generation_max_length": 8, "alpha": 0.0}
    trainer = Seq2SeqDistillationTrainer(
        student,
        None,
        arguments(tmp_path, Seq2SeqDistillationArguments, **options),
        train_dataset=RAW[TASK],  # type: ignore[arg-type]
        processing_class=tokenizer(),
    )
    before = student.generation_config.to_dict()
    metrics = trainer.evaluate(RAW[TASK])  # type: ignore[arg-type]
    predicted = trainer.predict(RAW[TASK])  # type: ignore[arg-type]
    assert predicted.metrics
    assert predicted.metrics["test_loss"] == metrics["eval_loss"] > 0
    assert len(predicted.predictions) == 6
    assert student.generation_config.to_dict() == before  # transformers would fill it
    without_targets = [{"input_ids": [5, 6]}]
    assert trainer.predict(without_targets).predictions.shape[0] == 1  # type: ignore[arg-type]


def test_arguments_of_the_other_trainer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="use hf_distill.Seq2SeqDistillationArguments"):
        Seq2SeqDistillationTrainer(make_model("T5", TASK), None, arguments(tmp_path, alpha=0.0))


def test_rows_of_a_causal_model_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"alpha": 0.0, "max_steps": 1, "per_device_train_batch_size": 3}
    for rows, copies in (
        (make_rows(TASK), False),
        ([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}] * 3, True),
    ):
        trainer = DistillationTrainer(
            make_model("T5", TASK), None, arguments(tmp_path, **options), train_dataset=rows,
            data_collator=collate,
        )  # fmt: skip
        trainer.train()
        assert ("would learn to copy its source" in caplog.text) == copies


@pytest.mark.parametrize("kind", ["full", "top_k", "sampled"])
def test_a_recorded_teacher_trains_as_the_live_one(kind: str, tmp_path: Path) -> None:
    """All 40 ids are recorded, so that only the codec's rounding is between the two."""
    teacher, rows = make_model("Bart", TASK, 1), Dataset.from_list(make_rows(TASK))
    recording = record(
        rows, teacher, tmp_path / "recording", kind=kind, k=40, draws=20000, batch_size=3,
        data_collator=collate,
    )  # fmt: skip
    found = []
    for given, dataset in ((teacher, rows), (None, recording)):
        trainer = DistillationTrainer(
            make_model("Bart", TASK, 0),
            given,
            arguments(tmp_path / "out", alpha=1.0, learning_rate=1e-2, max_steps=4),
            train_dataset=dataset,
            data_collator=collate,
        )
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    tolerance = {"full": 1e-3, "top_k": 2e-2, "sampled": 0.1}[kind]
    assert found[1] == pytest.approx(found[0], rel=tolerance)


def test_rows_changed_after_recording(tmp_path: Path) -> None:
    teacher, rows = make_model("Bart", TASK, 1), make_rows(TASK)
    recording = record(
        Dataset.from_list(rows), teacher, tmp_path / "r", data_collator=collate
    ).to_list()
    recording[0]["labels"] = [*recording[0]["labels"][:-1], 17]
    trainer = DistillationTrainer(
        make_model("Bart", TASK, 0), None, arguments(tmp_path / "out"),
        train_dataset=recording, data_collator=collate,
    )  # fmt: skip
    with pytest.raises(InputError, match="belongs to another row"):
        trainer.train()


def test_what_cannot_be_recorded(tmp_path: Path) -> None:
    task = "question-answering"
    rows = Dataset.from_list(make_rows(task))
    with pytest.raises(InputError, match="its outcomes are the positions of a row"):
        record(rows, make_model("Bert", task), tmp_path / "r", data_collator=collate)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("sequence-classification", "columns text, label and no input_ids: .*tokenize_labelled"),
        ("token-classification", "tokenize_tagged"),
        ("masked-lm", "tokenize_texts, then mask_rows"),
    ],
)
def test_raw_rows_are_not_recorded(task: str, message: str, tmp_path: Path) -> None:
    for rows in (RAW[task], Dataset.from_list(RAW[task])):
        with pytest.raises(InputError, match=message):
            record(rows, make_model("Bert", task), tmp_path / "r", tokenizer=word_pieces())
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("task", "message"),
    [("masked-lm", "mask them first with hf_distill.data.mask_rows"),
     ("sequence-classification", "columns input_ids, but no labels")],
)  # fmt: skip
def test_rows_without_labels_are_not_recorded(task: str, message: str, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"input_ids": [2, 5, 6, 3]}] * 3)
    model, folder = make_model("Bert", task), tmp_path / "r"
    with pytest.raises(InputError, match=message):
        record(rows, model, folder, tokenizer=word_pieces())
    if task == "masked-lm":
        with pytest.raises(InputError, match=message):
            record(rows, model, folder, data_collator=masking_collator(word_pieces()))
    assert not folder.exists()


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification", "masked-lm"])
def test_recorded_encoders(task: str, tmp_path: Path) -> None:
    teacher, rows = make_model("Bert", task, 1), Dataset.from_list(make_rows(task))
    recording = record(rows, teacher, tmp_path / "r", kind="full", data_collator=collate)
    found = []
    for given, dataset in ((teacher, rows), (None, recording)):
        trainer = DistillationTrainer(
            make_model("Bert", task, 0), given, arguments(tmp_path / "out", alpha=1.0),
            train_dataset=dataset, data_collator=collate,
        )  # fmt: skip
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert found[1] == pytest.approx(found[0], rel=2e-3)
