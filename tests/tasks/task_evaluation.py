"""Pairs, rows and tokenizers for evaluations of every task, on one process or several."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from task_models import make_model, make_rows
from task_text import CLASSES, RAW, word_pieces
from writing_setup import tokenizer as byte_level
from writing_setup import writer

from hf_distill.data import tokenize_questions, tokenize_source_target
from hf_distill.data.task_rows import read_questions, read_source_target
from hf_distill.evaluation import evaluate_student

SEVERAL = {"problem_type": "multi_label_classification"}
NUMBERS = {"problem_type": "regression", "num_labels": 1}
WRITE = {"max_new_tokens": 8, "num_beams": 2}
KINDS = (
    "masked-lm", "seq2seq-lm", "one class", "several classes", "numbers", "token-classification",
    "question-answering", "answers", "texts",
)  # fmt: skip


def pair(kind: str) -> tuple[Any, Any]:
    """A student and a teacher."""
    if kind == "texts":
        return writer("t5", 1), writer("t5", 2)
    task, config = {
        "one class": ("sequence-classification", {}),
        "several classes": ("sequence-classification", SEVERAL),
        "numbers": ("sequence-classification", NUMBERS),
        "answers": ("question-answering", {}),
    }.get(kind, (kind, {}))
    if task == "token-classification":
        config = {"id2label": dict(enumerate(CLASSES))}
    name = "Bart" if task == "seq2seq-lm" else "Bert"
    return make_model(name, task, 0, **config), make_model(name, task, 1, **config)


def rows(kind: str, number: int = 13) -> list[dict[str, Any]]:
    """Rows of token ids; some of them have no label."""
    if kind == "answers":
        given = [RAW["question-answering"][n % 6] for n in range(number)]
        read = read_questions(Dataset.from_list(given))
        return tokenize_questions(read, word_pieces(), max_length=20, stride=4)[0].to_list()
    if kind == "texts":
        given = [RAW["seq2seq-lm"][n % 6] for n in range(number)]
        read = read_source_target(Dataset.from_list(given))
        limits = {"max_source_length": 40, "max_target_length": 4}
        return tokenize_source_target(read, byte_level(), **limits)[0].to_list()
    task = (
        "sequence-classification" if kind in ("one class", "several classes", "numbers") else kind
    )
    found = make_rows(task, number)
    for index, row in enumerate(found):
        if kind == "several classes":
            row["labels"] = [float((index >> n) % 2) for n in range(5)]
        if kind == "numbers":
            row["labels"] = index / 4
    for row in found[3:4]:
        if kind == "one class":
            row["labels"] = -100
        if kind == "several classes":
            row["labels"] = [-100.0] * 5
        if kind == "numbers":
            row["labels"] = float("nan")
        if kind == "question-answering":
            row |= {"start_positions": 99, "end_positions": 99}  # beyond the row
    return found


def evaluate(kind: str, number: int = 13, **options: Any) -> dict[str, float]:
    """`evaluate_student` of a pair on these rows, without cost."""
    student, teacher = pair(kind)
    if kind == "answers":
        options["references"] = [RAW["question-answering"][n % 6] for n in range(number)]
    if kind == "texts":
        options["generate"] = WRITE
    tokenizer = byte_level() if kind in ("texts", "seq2seq-lm") else word_pieces()
    if kind == "masked-lm":
        options["shared_vocabulary"] = 40  # more than the tokenizer has
    options = {"speed": False} | options
    given = options.pop("rows", None) or rows(kind, number)
    found = evaluate_student(student, teacher, given, tokenizer, **options)
    return {k: v for k, v in found.items() if k not in ("parameters", "size_mb")}
