"""Every task through the real trainer: the objective, saving, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import task_grid
import torch
from distributed import launch
from task_models import CLASSES, cases, collate, make_model, make_rows
from trainer_setup import arguments

from hf_distill import DistillationTrainer
from hf_distill.errors import InputError
from hf_distill.tasks import find_task

TOLERANCE = 1e-4


def too_far(errors: dict[str, float]) -> bool:
    return len(errors) < 4 or any(not error < TOLERANCE for error in errors.values())


@pytest.mark.parametrize("case", [c for c in task_grid.cases() if c.processes == 1], ids=str)
def test_the_objective_on_one_process(case: task_grid.Case, tmp_path: Path) -> None:
    errors = task_grid.run(case, tmp_path)
    assert not too_far(errors), errors


def test_the_objective_on_two_processes(tmp_path: Path) -> None:
    launch("task_worker.py", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == sum(case.processes == 2 for case in task_grid.cases())
    assert not {name: errors for name, errors in found.items() if too_far(errors)}


@pytest.mark.parametrize(("name", "task"), cases(), ids="-".join)
def test_a_step_saved_and_loaded_again(name: str, task: str, tmp_path: Path) -> None:
    student, rows = make_model(name, task, 0), make_rows(task)
    trainer = DistillationTrainer(
        student,
        make_model(name, task, 1),
        arguments(tmp_path, max_steps=1, fp16=False),
        train_dataset=rows,
        data_collator=collate,
    )
    assert find_task(student, "student").key == task
    assert trainer._loss.student.fused == task.endswith("-lm")
    trainer.train()
    trainer.save_model(str(tmp_path / "student"))
    again = DistillationTrainer(
        str(tmp_path / "student"),
        None,
        arguments(tmp_path, alpha=0.0),
        eval_dataset=rows,
        data_collator=collate,
    )
    assert type(again.model) is type(student)
    before = student.state_dict()
    for key, value in again.model.state_dict().items():
        torch.testing.assert_close(value, before[key])
    trainer.args.alpha = 0.0
    ours, theirs = trainer.evaluate(rows)["eval_loss"], again.evaluate()["eval_loss"]
    assert ours == pytest.approx(theirs, rel=1e-5)


def refused(
    match: str, folder: Path, student: Any, teacher: Any, rows: Any, **options: Any
) -> None:
    with pytest.raises(InputError, match=match) as caught:
        DistillationTrainer(
            student,
            teacher,
            arguments(folder),
            train_dataset=rows,
            data_collator=collate,
            **options,
        ).train()
    assert "\n" not in str(caught.value)


def test_classes_that_do_not_mean_the_same(tmp_path: Path) -> None:
    task = "sequence-classification"
    student, rows = make_model("Bert", task), make_rows(task)
    refused("5 classes and the teacher 3", tmp_path, student,
            make_model("Bert", task, num_labels=3), rows)  # fmt: skip
    names = {0: "a", 1: "b", 2: "c", 3: "d", 4: "e"}
    swapped = {0: "b", 1: "a", 2: "c", 3: "d", 4: "e"}
    refused("class 0 is 'a' for the student and 'b'", tmp_path,
            make_model("Bert", task, id2label=names), make_model("Bert", task, id2label=swapped),
            rows)  # fmt: skip
    refused("problem_type is", tmp_path, student,
            make_model("Bert", task, problem_type="multi_label_classification"), rows)  # fmt: skip


def test_labels_that_are_none(tmp_path: Path) -> None:
    for task in ("sequence-classification", "token-classification"):
        model, rows = make_model("Bert", task), make_rows(task)
        wrong = [row | {"labels": [9] * len(row["input_ids"])} for row in rows]
        if task == "sequence-classification":
            wrong = [row | {"labels": 9} for row in rows]
        refused(f"the class 9, but the student has the classes 0 to {CLASSES - 1}", tmp_path,
                model, model.__class__(model.config), wrong)  # fmt: skip


def test_labels_of_another_problem(tmp_path: Path) -> None:
    task = "sequence-classification"
    rows = make_rows(task)
    model, teacher = make_model("Bert", task), make_model("Bert", task, 1)
    several = [row | {"labels": [0, 1, 0, 0, 1]} for row in rows]
    refused("multi_label_classification", tmp_path, model, teacher, several)
    refused("labels are fractions", tmp_path, model, teacher,
            [row | {"labels": 0.5} for row in rows])  # fmt: skip
    numbers = make_model("Bert", task, num_labels=1)
    teacher = make_model("Bert", task, 1, num_labels=1)
    with pytest.raises(InputError, match="squared difference"):
        DistillationTrainer(numbers, teacher, arguments(tmp_path, divergence="jsd"))


def test_an_answer_where_none_may_be(tmp_path: Path) -> None:
    task = "question-answering"
    rows = [row | {"answer_mask": [0] * len(row["input_ids"])} for row in make_rows(task)]
    for row in rows:
        row["answer_mask"][row["end_positions"]] = 1
    teacher = make_model("Bert", task, 1)
    message = "the answer of row 1 of a batch is where answer_mask is 0"
    refused(message, tmp_path, make_model("Bert", task), teacher, rows)


def test_an_answer_mask_takes_positions_out_of_the_distributions(tmp_path: Path) -> None:
    """With two positions possible, cross-entropy is that of two logits."""
    task = "question-answering"
    student, rows = make_model("Bert", task), make_rows(task)
    for row in rows:
        length = len(row["input_ids"])
        row |= {
            "start_positions": 1,
            "end_positions": 1,
            "answer_mask": [0, 1, 1] + [0] * (length - 3),
        }
    trainer = DistillationTrainer(
        student, None, arguments(tmp_path, alpha=0.0), eval_dataset=rows, data_collator=collate
    )
    total = 0.0
    for row in rows:
        out = student(input_ids=torch.tensor([row["input_ids"]]))
        for logits in (out.start_logits[0], out.end_logits[0]):
            total -= torch.log_softmax(logits[1:3].double(), -1)[0].item()
    assert trainer.evaluate()["eval_ce"] == pytest.approx(total / 16, rel=1e-5)


def test_student_and_teacher_of_different_tasks(tmp_path: Path) -> None:
    student = make_model("Bert", "token-classification")
    rows = make_rows("token-classification")
    refused("the teacher is a BertForQuestionAnswering", tmp_path, student,
            make_model("Bert", "question-answering"), rows)  # fmt: skip
    refused("task is 'summarise', but must be one of causal-lm", tmp_path, student, None, rows,
            task="summarise")  # fmt: skip
