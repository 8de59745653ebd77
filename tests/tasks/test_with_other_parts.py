"""Tasks together with LoRA, layers of the teacher, resuming, own divergences and own terms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from task_models import collate, make_model, make_rows
from task_text import word_pieces
from trainer_setup import arguments

from hf_distill import (
    AdapterTeacher,
    DistillationTrainer,
    InputError,
    Term,
    evaluate_student,
    record,
    student_from_teacher,
)
from hf_distill.losses.targets import sum_by_row

CASES = [
    ("T5", "seq2seq-lm"),
    ("Bart", "seq2seq-lm"),
    ("Bert", "masked-lm"),
    ("Bert", "sequence-classification"),
    ("Bert", "token-classification"),
    ("Bert", "question-answering"),
]
EACH = pytest.mark.parametrize(("name", "task"), CASES)


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@EACH
def test_an_adapter_learns_from_its_base_model(name: str, task: str, tmp_path: Path) -> None:
    """The base model, and not the adapter, is what the student is drawn back to."""
    student, rows = make_model(name, task), make_rows(task)
    modules = {"T5": ["q", "v"], "Bart": ["q_proj", "v_proj"], "Bert": ["query", "value"]}[name]
    lora = LoraConfig(r=2, target_modules=modules, init_lora_weights=False)
    trainer = DistillationTrainer(
        student, None, arguments(tmp_path, alpha=0.0), peft_config=lora, train_dataset=rows,
        eval_dataset=rows, data_collator=collate,
    )  # fmt: skip
    model: Any = trainer.model
    taught = DistillationTrainer(
        model, AdapterTeacher(model),
        arguments(tmp_path, alpha=1.0, learning_rate=1e-2, max_steps=12),
        train_dataset=rows, eval_dataset=rows, data_collator=collate,
    )  # fmt: skip
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    apart = taught.evaluate()["eval_forward_kl"]
    taught.train()
    assert taught.evaluate()["eval_forward_kl"] < 0.9 * apart
    for key, value in model.named_parameters():
        assert key not in before or torch.equal(value, before[key])


@EACH
def test_a_student_of_the_teachers_layers(name: str, task: str, tmp_path: Path) -> None:
    layers = {
        "T5": {"num_layers": 3, "num_decoder_layers": 2},
        "Bart": {"encoder_layers": 3, "decoder_layers": 2},
        "Bert": {"num_hidden_layers": 3},
    }[name]
    teacher, rows = make_model(name, task, 1, **layers), make_rows(task)
    chosen: Any = {"encoder": [0, 2], "decoder": [1]} if name != "Bert" else [0, 2]
    student = student_from_teacher(teacher, chosen)
    trainer = DistillationTrainer(
        student, teacher, arguments(tmp_path), train_dataset=rows, data_collator=collate
    )
    trainer.train()
    assert sum(p.numel() for p in student.parameters()) < sum(
        p.numel() for p in teacher.parameters()
    )
    assert all(torch.isfinite(torch.tensor(losses(trainer))))


@pytest.mark.parametrize(("name", "task"), [CASES[0], CASES[3]])
def test_resumed_training_is_the_same(name: str, task: str, tmp_path: Path) -> None:
    rows = make_rows(task)

    def trainer(folder: str, steps: int) -> DistillationTrainer:
        options = {
            "max_steps": steps,
            "save_strategy": "steps",
            "save_steps": 2,
            "lr_scheduler_type": "constant",
        }
        return DistillationTrainer(
            make_model(name, task, 0), make_model(name, task, 1),
            arguments(tmp_path / folder, **options), train_dataset=rows, data_collator=collate,
        )  # fmt: skip

    whole = trainer("whole", 4)
    whole.train()
    trainer("parts", 2).train()
    resumed = trainer("parts", 4)
    resumed.train(resume_from_checkpoint=True)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


@EACH
def test_a_divergence_of_ones_own(name: str, task: str, tmp_path: Path) -> None:
    rows = make_rows(task)
    student, teacher = make_model(name, task, 0), make_model(name, task, 1)
    options: dict[str, Any] = {"eval_dataset": rows, "data_collator": collate}
    trainer = DistillationTrainer(
        student, teacher, arguments(tmp_path, alpha=1.0), divergence=oracle.squared_hellinger,
        **options,
    )  # fmt: skip
    # Between 0 and 1, and 0 where both agree.
    assert 0 < trainer.evaluate()["eval_squared_hellinger"] < 1
    same = DistillationTrainer(
        student, make_model(name, task, 0), arguments(tmp_path, alpha=1.0),
        divergence=oracle.squared_hellinger, **options,
    )  # fmt: skip
    assert same.evaluate()["eval_squared_hellinger"] == pytest.approx(0, abs=1e-6)


class Confident(DistillationTrainer):
    """Adds the student's largest logit at each target, averaged over the targets."""

    def extra_terms(self, inputs: Any, outputs: Any) -> dict[str, Term]:
        logits = self._loss.task.logits(outputs, inputs).amax(-1).sum(-1)
        rows = torch.arange(len(logits), device=logits.device)
        return {"largest": Term(sum_by_row(logits, rows, len(logits)), "rows", 0.25)}


@EACH
def test_a_term_of_ones_own(name: str, task: str, tmp_path: Path) -> None:
    rows = make_rows(task)
    found = [
        kind(
            make_model(name, task, 0), make_model(name, task, 1), arguments(tmp_path),
            eval_dataset=rows, data_collator=collate,
        ).evaluate()
        for kind in (DistillationTrainer, Confident)
    ]  # fmt: skip
    plain, own = found
    assert own["eval_loss"] == pytest.approx(
        plain["eval_loss"] + 0.25 * own["eval_largest"], rel=1e-5
    )


def test_a_classifier_is_recorded_with_its_own_collator(tmp_path: Path) -> None:
    task = "sequence-classification"
    rows, teacher = Dataset.from_list(make_rows(task)), make_model("Bert", task)
    given: Any = {"kind": "full", "tokenizer": word_pieces()}
    found = record(rows, teacher, tmp_path / "a", **given)
    expected = record(rows, teacher, tmp_path / "b", data_collator=collate, **given)
    assert found.to_list() == expected.to_list()
    with pytest.raises(InputError, match="give tokenizer, or data_collator"):
        record(rows, teacher, tmp_path / "c", kind="full")


def test_raw_rows_are_not_evaluated() -> None:
    model = make_model("Bert", "sequence-classification")
    with pytest.raises(InputError, match="columns text, label, but no input_ids"):
        evaluate_student(model, None, [{"text": "a", "label": 1}], word_pieces())
