"""`evaluate_student` of every task, against figures worked out row by row in float64."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from statistics import correlation, fmean
from typing import Any

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from distributed import launch
from task_evaluation import KINDS, WRITE, evaluate, pair, rows
from task_models import make_model, make_rows
from task_text import RAW, word_pieces
from writing_setup import tokenizer as byte_level

from hf_distill import InputError, evaluate_student
from hf_distill.data import TaskCollator, read_questions, tokenize_questions
from hf_distill.evaluation import Bleu, ChrF, Entities, Rouge, evaluate_models
from hf_distill.evaluation.task_metrics import QuestionAnswering
from hf_distill.teachers import LiveTeacher

CLASSIFY = "sequence-classification"


@torch.no_grad()
def distributions(kind: str, model: Any, row: dict[str, Any]) -> list[tuple[Any, int | None]]:
    """The probabilities at each target of a row, without padding, and the label or None."""
    model, ids = copy.deepcopy(model).double().eval(), torch.tensor([row["input_ids"]])
    if kind == "seq2seq-lm":
        labels = torch.tensor([row["labels"]])
        if (labels == -100).all():
            return []
        logits = model(input_ids=ids, labels=labels).logits[0]
        return list(zip(logits.softmax(-1), row["labels"], strict=True))
    output = model(input_ids=ids)
    if kind == "question-answering":
        found = []
        for name in ("start", "end"):
            place = row[f"{name}_positions"]
            probabilities = output[f"{name}_logits"][0].softmax(-1)
            found.append((probabilities, place if place < ids.shape[1] else None))
        return found
    logits = output.logits[0]
    if kind == "one class":
        return [(logits.softmax(-1), None if row["labels"] == -100 else row["labels"])]
    if kind == "several classes":
        yes = logits.sigmoid()
        pairs = torch.stack((1 - yes, yes), -1)
        return [
            (p, None if label == -100 else int(label))
            for p, label in zip(pairs, row["labels"], strict=True)
        ]
    return [(p, y) for p, y in zip(logits.softmax(-1), row["labels"], strict=True) if y != -100]


def of_distributions(kind: str) -> dict[str, float]:
    """The figures of distributions, target by target."""
    student, teacher = pair(kind)
    surprises, divergences, agreed, bins = [], [], [], [[] for _ in range(15)]
    for row in rows(kind):
        ours, theirs = (distributions(kind, model, row) for model in (student, teacher))
        for (q, label), (p, _) in zip(ours, theirs, strict=True):
            divergences.append(math.fsum(p * (p / q).log()))
            agreed.append(int(q.argmax()) == int(p.argmax()))
            if label is not None:
                surprises.append(-math.log(q[label]))
                best = int(q.argmax())
                bins[math.ceil(15 * q[best].item()) - 1].append((q[best].item(), best == label))
    gaps = (abs(sum(c - k for c, k in found)) for found in bins)
    return {
        "targets": len(divergences),
        "ce": fmean(surprises),
        "kl_to_teacher": fmean(divergences),
        "top1_agreement": fmean(agreed),
        "calibration_error": sum(gaps) / len(surprises),
    }


def f1(said: list[int], true: list[int], wanted: int) -> float:
    both = sum(a == b == wanted for a, b in zip(said, true, strict=True))
    return 2 * both / max(said.count(wanted) + true.count(wanted), 1)


def of_classes(kind: str) -> dict[str, float]:
    """Accuracy and F1 of the likeliest outcomes."""
    student, _ = pair(kind)
    found = [distributions(kind, student, row) for row in rows(kind)]
    known = [[(int(q.argmax()), y) for q, y in row if y is not None] for row in found]
    said, true = ([one[side] for row in known for one in row] for side in (0, 1))
    if kind == "several classes":
        columns = [list(zip(*column, strict=True)) for column in zip(*filter(None, known))]  # noqa: B905
        both = sum(a * b for a, b in zip(said, true, strict=True))
        return {
            "accuracy": fmean(all(a == b for a, b in row) for row in known if row),
            "macro_f1": fmean(f1(list(a), list(b), 1) for a, b in columns),
            "micro_f1": 2 * both / (sum(said) + sum(true)),
        }
    return {
        "accuracy": fmean(a == b for a, b in zip(said, true, strict=True)),
        "macro_f1": fmean(f1(said, true, one) for one in {*said, *true}),
    }


@pytest.mark.parametrize(
    "kind", ["masked-lm", "seq2seq-lm", "one class", "several classes", "token-classification",
             "question-answering"]
)  # fmt: skip
def test_quality_equals_the_oracle(kind: str) -> None:
    expected = of_distributions(kind)
    if kind == "masked-lm":
        expected["accuracy"] = of_classes(kind)["accuracy"]
    if kind.endswith("-lm"):
        expected["perplexity"] = math.exp(expected["ce"])
    elif kind != "question-answering":
        expected |= of_classes(kind)
    found = evaluate(kind, batch_size=5)
    if kind == "seq2seq-lm":
        labels = [label for row in rows(kind) for label in row["labels"] if label != -100]
        text = sum(
            len(byte_level().decode(row["labels"], skip_special_tokens=True).encode())
            for row in rows(kind) if row["labels"] != [-100]
        )  # fmt: skip
        bits = expected["ce"] * len(labels) / math.log(2)
        assert found.pop("bits_per_byte") == pytest.approx(bits / text, rel=2e-5)
    assert found == pytest.approx(expected, rel=2e-5)
    assert found["kl_to_teacher"] > 0.005


def test_entities_where_the_tags_mark_some() -> None:
    """Only tokens with a tag count, as `test_task_metrics` counts them."""
    names = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    student = make_model("Bert", "token-classification", 0, id2label=dict(enumerate(names)))
    given, tokenizer = make_rows("token-classification", 13), word_pieces()
    found = evaluate_student(student, None, given, tokenizer, speed=False, batch_size=5)
    said, true = [], []
    for row in given:
        with torch.no_grad():
            best = student(torch.tensor([row["input_ids"]])).logits[0].argmax(-1).tolist()
        kept = [n for n, label in enumerate(row["labels"]) if label != -100]
        said.append([names[best[n]] for n in kept])
        true.append([names[row["labels"][n]] for n in kept])
    expected = Entities().compute(predictions=said, references=true)
    assert found["entity_f1"] > 0
    assert {name: found[name] for name in expected} == expected
    plain = make_model("Bert", "token-classification", 0)
    assert "entity_f1" not in evaluate_student(plain, None, given, tokenizer, speed=False)


def test_numbers() -> None:
    student, teacher = pair("numbers")
    ours, theirs, true = [], [], []
    for row in rows("numbers"):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            said = [copy.deepcopy(m).double()(ids).logits.item() for m in (student, teacher)]
        ours.append(said[0])
        theirs.append(said[1])
        true.append(row["labels"])
    known = [n for n, label in enumerate(true) if label == label]
    assert len(known) == 12
    a, b = [ours[n] for n in known], [true[n] for n in known]

    def ranks(values: list[float]) -> list[float]:
        return [sum(other < one for other in values) for one in values]

    assert evaluate("numbers", batch_size=5) == pytest.approx(
        {
            "targets": 13,
            "mse": fmean((x - y) ** 2 for x, y in zip(a, b, strict=True)),
            "pearson": correlation(a, b),
            "spearman": correlation(ranks(a), ranks(b)),
            "mse_to_teacher": fmean((x - y) ** 2 for x, y in zip(ours, theirs, strict=True)),
        },
        rel=2e-5,
    )


@torch.no_grad()
def test_answers_are_the_best_spans_of_all_windows() -> None:
    student, _ = pair("answers")
    windows = rows("answers")
    given = [RAW["question-answering"][n % 6] for n in range(13)]
    assert len(windows) > 13  # some contexts need several
    said, left_out = [], 0
    for question, row in enumerate(given):
        best, nothing = (-math.inf, ""), math.inf
        for window in windows:
            if window["row"] != question:
                continue
            output = student(torch.tensor([window["input_ids"]]))
            start, end = output.start_logits[0].tolist(), output.end_logits[0].tolist()
            nothing = min(nothing, start[0] + end[0])
            places = [n for n, offset in enumerate(window["offsets"]) if offset[0] >= 0]
            for first in places:
                for last in places:
                    if 0 <= last - first < 30:
                        a, b = window["offsets"][first][0], window["offsets"][last][1]
                        best = max(best, (start[first] + end[last], row["context"][a:b]))
        left_out += nothing > best[0]
        said.append("" if nothing > best[0] else best[1])
    expected = QuestionAnswering().compute(
        predictions=said, references=[row["answers"]["text"] for row in given]
    )
    found = evaluate("answers", batch_size=5)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found.keys() >= {"exact_match", "f1", "no_answer_accuracy", "kl_to_teacher", "ce"}
    assert len(set(said)) > 1


def test_a_question_always_has_an_answer_where_all_have_one() -> None:
    """Even where no answer is by far the likeliest, as in SQuAD 1.1."""
    model = make_model("Bert", "question-answering", 0)

    def prefer_none(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros_like(logits)
        logits[:, 0] = 9.0  # [CLS], which stands for no answer
        logits[:, 10, 0] = logits[:, 11, 1] = 5.0  # "cats" in the first window
        return logits

    model.qa_outputs.register_forward_hook(prefer_none)
    answered, unanswered = RAW["question-answering"][1], RAW["question-answering"][0]
    windows = [one for one in rows("answers", 2) if one["row"] == 1]
    assert len(windows) > 1

    def found(references: Any, given: Any) -> dict[str, float]:
        return evaluate_student(
            model, None, given, word_pieces(), references=references, speed=False
        )

    alone = found([answered], [{**one, "row": 0} for one in windows])
    assert (alone["exact_match"], alone["f1"]) == (100, 100)
    assert "no_answer_accuracy" not in alone
    both = found([unanswered, answered], rows("answers", 2))
    assert (both["has_answer_exact_match"], both["no_answer_accuracy"]) == (0, 100)


@torch.no_grad()
def test_references_are_the_questions_of_the_windows() -> None:
    given = Dataset.from_list(RAW["question-answering"])
    questions = read_questions(given)
    windows, _ = tokenize_questions(questions, word_pieces(), max_length=30, stride=4)
    model = make_model("Bert", "question-answering", 0)
    for references in (questions.select(range(2)), concatenate_datasets([questions, questions])):
        with pytest.raises(InputError, match=r"windows of \d+ questions, but the \d+ references"):
            evaluate_student(
                model, None, windows, word_pieces(), references=references, speed=False
            )


def test_written_text_is_compared_with_the_references() -> None:
    student, teacher = pair("texts")
    given, tokenizer = rows("texts"), byte_level()

    def written(model: Any) -> list[str]:
        ids = (torch.tensor([row["input_ids"]]) for row in given)
        texts = [model.generate(one, **WRITE)[0] for one in ids]
        return tokenizer.batch_decode(texts, skip_special_tokens=True)

    spelt = tokenizer.batch_decode([row["labels"] for row in given], skip_special_tokens=True)
    whole = [RAW["seq2seq-lm"][n % 6]["summary"] for n in range(13)]
    assert spelt != whole  # targets are cut
    pairs = [[one, said] for one, said in zip(whole, written(teacher), strict=True)]
    pairs[0][1] = "the fox"
    cases: Any = ((student, None, spelt), (student, whole, whole), (teacher, pairs, pairs))
    for model, references, expected in cases:
        figures: dict[str, float] = {}
        for metric in (Rouge(), Bleu(), ChrF()):
            figures |= metric.compute(predictions=written(model), references=expected)
        found = evaluate_student(
            model, teacher, given, tokenizer, generate=WRITE, references=references,
            speed=False, batch_size=4,
        )  # fmt: skip
        assert {name: found[name] for name in figures} == pytest.approx(figures)
        assert (50 < found["chrf"] < 100) == (references is pairs)
        assert found["bits_per_byte"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_batch_size_does_not_matter(kind: str) -> None:
    expected = evaluate(kind, batch_size=3)
    for batch_size in (1, 13):
        assert evaluate(kind, batch_size=batch_size) == pytest.approx(expected, rel=2e-6)


def test_processes_do_not_matter(tmp_path: Path) -> None:
    launch("task_evaluation_worker.py", str(tmp_path / "out"))
    found = [json.loads((tmp_path / f"out.{rank}").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    assert len(found[0]) == len(KINDS) + 3
    for name, figures in found[0].items():
        kind, number = name.removesuffix(" rows").split(", ")
        assert figures == pytest.approx(evaluate(kind, int(number), batch_size=3), rel=2e-6), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_beside_itself_and_alone(kind: str) -> None:
    student, _ = pair(kind)
    tokenizer = byte_level() if kind in ("texts", "seq2seq-lm") else word_pieces()
    itself = evaluate_student(student, student, rows(kind), tokenizer, speed=False)
    if kind == "numbers":
        assert itself["mse_to_teacher"] == 0
    else:
        assert (itself["kl_to_teacher"], itself["top1_agreement"]) == (0, 1)
    alone = evaluate_student(student, None, rows(kind), tokenizer, speed=False)
    assert alone == {name: itself[name] for name in alone}
    assert not alone.keys() & {"kl_to_teacher", "top1_agreement", "mse_to_teacher"}


class Counting(LiveTeacher):
    """Counts the batches on which the model runs."""

    asked = 0

    def signal(self, *args: Any) -> Any:
        self.asked += 1
        return super().signal(*args)


@pytest.mark.parametrize("kind", KINDS)
def test_several_models_and_a_teacher_that_runs_once(kind: str) -> None:
    student, model = pair(kind)
    other, _ = pair(kind)
    with torch.no_grad():
        next(iter(other.parameters())).add_(0.1)
    tokenizer = byte_level() if kind in ("texts", "seq2seq-lm") else word_pieces()
    teacher = Counting(model, tokenizer)
    settings: dict[str, Any] = {"generate": WRITE} if kind == "texts" else {}
    accepted = [RAW["question-answering"][n % 6] for n in range(13)] if kind == "answers" else None
    quality, _ = evaluate_models(
        {"a": student, "b": other}, teacher, {"set": rows(kind)}, tokenizer,
        references=None if accepted is None else {"set": accepted},
        data_collator=TaskCollator(teacher.task.key, tokenizer), speed=False, **settings,
    )  # fmt: skip
    assert teacher.asked == math.ceil(len(rows(kind)) / 8)
    for name, one in (("a", student), ("b", other)):
        alone = evaluate_student(
            one, model, rows(kind), tokenizer, references=accepted, speed=False, **settings
        )
        found = quality["set"][name]
        assert found == pytest.approx({key: alone[key] for key in found})
        assert alone.keys() - found.keys() == {"parameters", "size_mb"}
        if kind not in ("question-answering", "seq2seq-lm"):
            assert found.predictions is not None
            assert found.predictions.texts == alone.predictions.texts  # type: ignore[union-attr]


def test_rows_are_masked_alike_for_every_model() -> None:
    student, teacher = pair("masked-lm")
    plain = [{"input_ids": row["input_ids"]} for row in make_rows("masked-lm", 40)]

    def found(model: Any, **options: Any) -> dict[str, float]:
        return evaluate_student(model, teacher, plain, word_pieces(), speed=False, **options)

    # Ids beyond the tokenizer's may be drawn as random tokens, but the models have more.
    ours = found(student)
    assert ours == pytest.approx(found(student, batch_size=3), rel=2e-6)
    assert ours["targets"] == found(teacher)["targets"] > 10
    assert "bits_per_byte" not in ours


@pytest.mark.parametrize("kind", ["one class", "seq2seq-lm", "masked-lm"])
def test_cost(kind: str) -> None:
    student, _ = pair(kind)
    tokenizer = byte_level() if kind == "seq2seq-lm" else word_pieces()
    found = evaluate_student(student, None, rows(kind), tokenizer)
    speed = {"examples_per_s"}
    if kind == "seq2seq-lm":
        speed = {"prefill_tokens_per_s", "decode_tokens_per_s"}
    assert found.keys() >= {"parameters", "size_mb", "peak_memory_mb"} | speed
    assert all(math.isfinite(value) and value >= 0 for value in found.values())
    assert ("examples_per_s" in found) == (kind != "seq2seq-lm")


@pytest.mark.parametrize("name", ["GPT2", "Roberta", "T5"])
def test_speed_of_other_architectures(name: str) -> None:
    task = "seq2seq-lm" if name == "T5" else CLASSIFY
    tokenizer = byte_level() if name == "T5" else word_pieces()
    found = evaluate_student(make_model(name, task), None, make_rows(task), tokenizer)
    assert found["peak_memory_mb"] > 0


def test_one_clear_line() -> None:
    student, teacher = pair("one class")
    given = make_rows(CLASSIFY, 4)

    def run(model: Any, other: Any, data: Any, **options: Any) -> None:
        evaluate_student(model, other, data, word_pieces(), speed=False, **options)

    with pytest.raises(InputError, match="a label is the class 7, but the student has the class"):
        run(student, teacher, [{**row, "labels": 7} for row in given])
    with pytest.raises(InputError, match="the student has 5 classes and the teacher 3"):
        run(student, make_model("Bert", CLASSIFY, num_labels=3), given)
    other = make_model("Bert", CLASSIFY, problem_type="multi_label_classification")
    with pytest.raises(InputError, match="problem_type is single_label_classification, but the"):
        run(student, other, given)
    with pytest.raises(InputError, match="generate is given, but the model is for sequence class"):
        run(student, teacher, given, generate={})
    with pytest.raises(InputError, match="the windows have no row, offsets, answer_mask"):
        asks = make_rows("question-answering")
        run(pair("answers")[0], None, asks, references=RAW["question-answering"])
    with pytest.raises(InputError, match="no target"):
        run(student, teacher, [{**row, "labels": -100} for row in given])
    with pytest.raises(InputError, match="there are 2 references for 13 rows"):
        evaluate("texts", references=["a", "b"])
    with pytest.raises(InputError, match="'beams' is no setting of generate"):
        student, teacher = pair("texts")
        evaluate_student(student, None, rows("texts"), byte_level(), generate={"beams": 2})
    with pytest.raises(InputError, match="no evaluation rows"):
        run(student, teacher, Dataset.from_list([]))
