"""Predictions in words, and the rows that are shown."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from sacrebleu.metrics import CHRF
from task_evaluation import KINDS, WRITE, evaluate, pair, rows
from task_models import make_model, make_rows
from task_text import CLASSES, RAW, word_pieces
from writing_setup import tokenizer as byte_level

from hf_distill import InputError, evaluate_student
from hf_distill.evaluation import Evaluation, examples
from hf_distill.evaluation.predictions import chosen_rows
from hf_distill.reporting.formatting import BY_KEY, SPREAD

LABELLED = ("one class", "several classes", "numbers", "token-classification", "masked-lm")


@torch.no_grad()
def expected(kind: str, model: Any, row: dict[str, Any]) -> tuple[str, str, float]:
    """Prediction, reference and score of one row, worked out alone."""
    logits = copy.deepcopy(model)(input_ids=torch.tensor([row["input_ids"]])).logits[0].tolist()
    labels = row["labels"]
    if kind == "numbers":
        return f"{logits[0]:.3g}", f"{labels:.3g}", 1 - (logits[0] - labels) ** 2
    if kind == "several classes":
        names = [model.config.id2label[n] for n in range(5)]
        said = [name for name, logit in zip(names, logits, strict=True) if logit > 0]
        true = [name for name, label in zip(names, labels, strict=True) if label == 1]
        score = math.nan if -100 in labels else float(said == true)
        return ", ".join(said) or "(none)", ", ".join(true) or "(none)", score
    if kind == "one class":
        best = max(range(len(logits)), key=logits.__getitem__)
        said, true = model.config.id2label[best], model.config.id2label.get(labels, "")
        return said, true, math.nan if labels == -100 else float(said == true)
    pairs = []
    for values, label in zip(logits, labels, strict=True):
        if label != -100:
            pairs.append((max(range(len(values)), key=values.__getitem__), label))
    right = [a == b for a, b in pairs]
    if kind == "token-classification":
        texts = (" ".join(CLASSES[one] for one in side) for side in zip(*pairs, strict=True))
    else:
        decode = word_pieces().decode
        texts = (" · ".join(decode([one]) for one in side) for side in zip(*pairs, strict=True))
    said, true = list(texts) or ("", "")
    return said, true, sum(right) / len(right) if right else math.nan


@pytest.mark.parametrize("kind", LABELLED)
def test_predictions_of_each_row(kind: str) -> None:
    student, _ = pair(kind)
    found = evaluate_student(
        student, None, rows(kind), word_pieces(), speed=False, batch_size=5
    ).predictions
    assert found is not None
    assert len(found.texts) == 13
    assert len({*found.texts}) > 1
    for number, row in enumerate(rows(kind)):
        text, reference, score = expected(kind, student, row)
        assert (found.texts[number], found.references[number]) == (text, reference)
        assert found.scores[number] == pytest.approx(score, nan_ok=True, abs=1e-4)


def test_answers_and_texts() -> None:
    questions = [RAW["question-answering"][n % 6] for n in range(13)]
    student, _ = pair("answers")
    found = evaluate_student(
        student, None, rows("answers"), word_pieces(), references=questions, speed=False
    )
    said = found.predictions
    assert said is not None
    assert {*said.references} == {"cats", "(no answer)"}
    assert found["f1"] == pytest.approx(100 * sum(said.scores) / 13)
    for text, question in zip(said.texts, questions, strict=True):
        assert text == "(no answer)" or text in question["context"]
    writer, _ = pair("texts")
    wrote = evaluate_student(
        writer, None, rows("texts"), byte_level(), generate=WRITE, speed=False, batch_size=5
    ).predictions
    assert wrote is not None
    for row, text, reference, score in zip(
        rows("texts"), wrote.texts, wrote.references, wrote.scores, strict=True
    ):
        ids = writer.generate(torch.tensor([row["input_ids"]]), **WRITE)[0]
        assert text == byte_level().decode(ids, skip_special_tokens=True)
        assert reference == byte_level().decode(row["labels"], skip_special_tokens=True)
        assert score == pytest.approx(CHRF().sentence_score(text, [reference]).score / 100)


def test_models_side_by_side_the_worst_rows_first() -> None:
    student, teacher = pair("one class")
    given, tokenizer = rows("one class"), word_pieces()
    measured = evaluate_student(student, teacher, given, tokenizer, speed=False)
    models = {"teacher": teacher, "baseline": teacher, "student": measured}
    numbers = [str(number) for number in range(13)]
    shown = examples(models, given, tokenizer, prompts=numbers, number=6)
    assert [list(row) for row in shown] == [
        ["prompt", "reference", "teacher", "baseline", "student"]
    ] * 6
    wrong = [row["student"] != row["reference"] for row in shown]
    assert wrong == sorted(wrong, reverse=True)
    assert 0 < sum(wrong) < 6
    for row in shown:
        of_teacher = expected("one class", teacher, given[int(row["prompt"])])
        assert (row["teacher"], row["reference"]) == of_teacher[:2]


def test_prompts_are_what_the_models_read() -> None:
    student, _ = pair("answers")
    questions = [RAW["question-answering"][n % 6] for n in range(13)]
    shown = examples(
        {"student": student}, rows("answers"), word_pieces(), references=questions, number=13
    )
    asked = {f"{row['question']}\n\n{row['context']}" for row in questions}
    assert {row["prompt"] for row in shown} == asked
    pairs, _ = pair("one class")
    tokenizer = word_pieces()
    row = {"input_ids": tokenizer("the cat sat", "the dog ran").input_ids, "labels": 1}
    (alone,) = examples({"a": pairs}, [row], tokenizer)
    assert alone["prompt"] == "the cat sat\nthe dog ran"
    (named,) = examples({"a": pairs}, [row], tokenizer, prompts=["The Cat"])
    assert named["prompt"] == "The Cat"
    # An encoder-decoder writes without being told.
    assert examples({"a": pair("texts")[0]}, rows("texts"), byte_level(), number=2)[1]["a"]


def test_all_models_see_the_masks_of_the_prompts() -> None:
    student, teacher = pair("masked-lm")
    plain = [{"input_ids": row["input_ids"]} for row in make_rows("masked-lm", 20)]
    for row in plain:
        row["input_ids"] = [token % 23 for token in row["input_ids"]]
    shown = examples({"teacher": teacher, "student": student}, plain, word_pieces(), number=5)
    assert len(shown) == 5
    for row in shown:
        masked = len(row["reference"].split(" · "))
        assert len(row["teacher"].split(" · ")) == len(row["student"].split(" · ")) == masked
    assert any("[MASK]" in row["prompt"] for row in shown)


def test_half_of_the_examples_are_wrong_and_come_first() -> None:
    scores = [1.0, 0.5, 1.0, 0.0, 1.0, 0.2, 1.0, 0.9, math.nan]
    chosen = chosen_rows(scores, 4)
    assert [scores[row] < 1 for row in chosen] == [True, True, False, False]
    assert [scores[row] for row in chosen] == sorted(scores[row] for row in chosen)
    assert len(chosen_rows(scores, 20)) == 8
    assert chosen_rows([1.0] * 5, 2) == [0, 2]
    assert chosen_rows([0.0] * 3, 8) == [0, 1, 2]
    assert chosen_rows([0.0, 1.0, 1.0, 1.0], 3)[0] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_has_a_name_and_a_direction(kind: str) -> None:
    """Reports and cards show what `evaluate_student` measures, all of it by a name of its own."""
    student, teacher = pair(kind)
    cost = evaluate_student(student, teacher, rows(kind)[:4], word_pieces()) if (
        kind == "one class"
    ) else {}  # fmt: skip
    neutral = {"targets", "brevity_penalty"}
    found = {**evaluate(kind), **cost}
    assert len(found) > 4
    for name in found:
        if name.endswith(SPREAD):  # stands beside the figure
            assert name.removesuffix(SPREAD) in found
            continue
        figure = BY_KEY[name]
        assert figure.label
        assert (figure.better is None) == (name in neutral), name
        assert not figure.percent or not figure.unit


def test_what_cannot_be_shown() -> None:
    student, teacher = pair("one class")
    given, tokenizer = rows("one class"), word_pieces()
    gpt2 = make_model("GPT2", "causal-lm")
    with pytest.raises(InputError, match="are shown by hf_distill.evaluation.continuations"):
        examples({"student": gpt2}, make_rows("causal-lm", 3), tokenizer)
    with pytest.raises(InputError, match="question answering needs references"):
        examples({"student": pair("answers")[0]}, rows("answers"), word_pieces())
    other = evaluate_student(teacher, None, given[:5], tokenizer, speed=False)
    with pytest.raises(InputError, match="predictions of 'a' and 'b' are for other rows"):
        examples({"a": other, "b": student}, given, tokenizer)
    with pytest.raises(InputError, match="there are 1 prompts and 13 predictions"):
        examples({"student": student}, given, tokenizer, prompts=["a"])
    with pytest.raises(InputError, match="no models"):
        examples({}, given, tokenizer)
    assert Evaluation({"ce": 1.0}).predictions is None


def test_the_answer_of_the_documentation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The code of docs/tasks.md gives the likeliest span of the context."""
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text()
    (code,) = re.findall(r"```python\n([^`]*best_spans[^`]*)```", page)
    model = make_model("Bert", "question-answering").float()
    model.save_pretrained(tmp_path)
    word_pieces().save_pretrained(tmp_path)
    question, context = "who sat ?", "the cats sat on the red mat"
    exec(code.replace("runs/qa/student", str(tmp_path)), {"question": question, "context": context})
    tokens = word_pieces()(question, context, return_offsets_mapping=True)
    offsets = tokens.pop("offset_mapping")
    with torch.no_grad():
        outputs = model(**{name: torch.tensor([ids]) for name, ids in tokens.items()})
    start, end = outputs.start_logits[0].tolist(), outputs.end_logits[0].tolist()
    places = [at for at, part in enumerate(tokens.sequence_ids()) if part == 1]
    spans = [(start[a] + end[b], a, b) for a in places for b in places if a <= b]
    _, first, last = max(spans)
    assert capsys.readouterr().out == context[offsets[first][0] : offsets[last][1]] + "\n"
