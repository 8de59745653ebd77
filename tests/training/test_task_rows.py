"""Raw rows of every task, given to the trainer as people have them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from distributed import TESTS
from trainer_setup import arguments

from hf_distill import DistillationTrainer, InputError

sys.path.insert(0, str(TESTS / "tasks"))

from task_models import make_model

TEXTS = ["The quick brown fox jumps.", "add first and second", "a single man", "for row in rows"]
ROWS: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "seq2seq-lm": (
        "Bart",
        [{"document": text, "summary": text[:8]} for text in TEXTS],
        {},
    ),
    "masked-lm": ("Bert", [{"text": text} for text in TEXTS], {}),
    "sequence-classification": (
        "Bert",
        [{"text": text, "label": ["good", "bad"][i % 2]} for i, text in enumerate(TEXTS)],
        {"num_labels": 2, "id2label": {0: "good", 1: "bad"}},
    ),
    "token-classification": (
        "Bert",
        [{"tokens": text.split(), "tags": [i % 2] * len(text.split())}
         for i, text in enumerate(TEXTS)],
        {"num_labels": 2},
    ),
    "question-answering": (
        "Bert",
        [{"question": "what?", "context": text,
          "answers": {"text": [text[2:6]], "answer_start": [2]}} for text in TEXTS],
        {},
    ),
}  # fmt: skip


def make(task: str, folder: Path, tokenizer: Any, rows: Any = None, **options: Any) -> Any:
    name, own, config = ROWS[task]
    positions = "max_position_embeddings"
    shape = config | {"vocab_size": 300, positions: 64}
    student, teacher = (make_model(name, task, seed, **shape) for seed in (0, 1))
    dataset = Dataset.from_list(own) if rows is None else rows
    limits = {"max_length": 40, "stride": 4, "max_target_length": 8}
    return DistillationTrainer(
        student, teacher, arguments(folder, **limits, **options),
        train_dataset=dataset, eval_dataset=dataset, processing_class=tokenizer,
    )  # fmt: skip


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    """With a mask token, which the tiny one has not."""
    tiny_tokenizer.mask_token = "<|endoftext|>"
    yield tiny_tokenizer
    tiny_tokenizer.mask_token = None


@pytest.mark.parametrize("task", ROWS)
def test_rows_as_people_have_them(
    task: str, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make(task, tmp_path, tokenizer)
    told = [line for line in capsys.readouterr().out.splitlines() if "_dataset:" in line]
    assert [line.partition(":")[0] for line in told] == ["train_dataset", "eval_dataset"]
    assert all("4 rows tokenized" in line for line in told)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer._loss.task.key == task


@pytest.mark.parametrize("task", ["sequence-classification", "question-answering", "seq2seq-lm"])
def test_a_list_of_rows(task: str, tmp_path: Path, tokenizer: Any) -> None:
    make(task, tmp_path, tokenizer, rows=ROWS[task][1]).train()


def test_the_names_of_the_student_decide_the_index(tmp_path: Path, tokenizer: Any) -> None:
    """Sorted, "bad" would be class 0."""
    trainer = make("sequence-classification", tmp_path, tokenizer)
    assert list(trainer.train_dataset["labels"]) == [0, 1, 0, 1]


def test_the_question_is_no_answer(tmp_path: Path, tokenizer: Any) -> None:
    trainer = make("question-answering", tmp_path, tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["answer_mask"].shape == batch["input_ids"].shape
    assert (batch["answer_mask"].sum(-1) < batch["attention_mask"].sum(-1)).all()


BAD = {
    "columns": ("sequence-classification", [{"words": "a b"}], "train_dataset: .*text"),
    "class": ("sequence-classification", [{"text": "a", "label": "ugly"}], "row 0: .*'ugly'"),
    "answer": (
        "question-answering",
        [{"question": "a", "context": "b c", "answers": {"text": ["x"], "answer_start": [0]}}],
        "row 0: the context does not contain the answer 'x'",
    ),
    "empty": ("seq2seq-lm", [{"document": "", "summary": "a"}], "row 0"),
    "causal": ("seq2seq-lm", [{"text": "a b c"}], "train_dataset: "),
    "weights": (
        "masked-lm",
        [{"text": "a b c", "ce_weight": 1.0}],
        "ce_weight, which would be lost",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_one_clear_line(name: str, tmp_path: Path, tokenizer: Any) -> None:
    task, rows, reason = BAD[name]
    with pytest.raises(InputError, match=reason) as caught:
        make(task, tmp_path, tokenizer, rows=Dataset.from_list(rows))
    assert "\n" not in str(caught.value)


def test_a_stream_is_tokenized_by_the_user(tmp_path: Path, tokenizer: Any) -> None:
    stream: Any = Dataset.from_list(ROWS["masked-lm"][1]).to_iterable_dataset()
    assert isinstance(stream, IterableDataset)
    with pytest.raises(InputError, match="give a datasets.Dataset"):
        make("masked-lm", tmp_path, tokenizer, rows=stream)


def test_tokenized_rows_of_an_encoder_decoder_without_targets(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows = Dataset.from_list([{"input_ids": [5, 6, 7]}] * 4)
    with pytest.raises(InputError, match="the batch has no labels"):
        make("seq2seq-lm", tmp_path, tokenizer, rows=rows).train()
