"""The metrics against figures worked out in float64, in probability space, target by target."""

from __future__ import annotations

import importlib
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from writing_setup import spaced_words

from hf_distill.errors import InputError
from hf_distill.evaluation import (
    BitsPerByte,
    CalibrationError,
    Perplexity,
    RowMetric,
    TeacherAgreement,
    row_sums,
    text_bytes,
)

METRICS = (Perplexity, BitsPerByte, TeacherAgreement, CalibrationError)
BYTES = [7, 0, 11]


def softmax(logits: Any) -> list[float]:
    weights = [math.exp(float(x)) for x in logits]
    return [w / math.fsum(weights) for w in weights]


def oracle(student: Any, teacher: Any, labels: list[int], shared: int) -> dict[str, float]:
    """Every figure from two matrices of logits, a row a target, without logarithms of softmaxes."""
    likelihood, kl, agreed, predictions = 1.0, 0.0, 0, []
    for s, t, label in zip(student, teacher, labels, strict=True):
        q = softmax(s)
        likelihood *= q[label] ** (1 / len(labels))  # the geometric mean
        predictions.append((max(q), q.index(max(q)) == label))
        q, p = softmax(s[:shared]), softmax(t[:shared])
        kl += sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
        agreed += q.index(max(q)) == p.index(max(p))
    error = 0.0
    for low in range(15):
        inside = [(c, k) for c, k in predictions if low / 15 < c <= (low + 1) / 15]
        if inside:
            confidence = sum(c for c, _ in inside) / len(inside)
            accuracy = sum(k for _, k in inside) / len(inside)
            error += len(inside) / len(predictions) * abs(confidence - accuracy)
    return {
        "perplexity": 1 / likelihood,
        "ce": -math.log(likelihood),
        "bits_per_byte": -math.log2(likelihood) * len(labels) / sum(BYTES),
        "kl_to_teacher": kl / len(labels),
        "top1_agreement": agreed / len(labels),
        "calibration_error": error,
    }


def batch(
    student_ids: int, teacher_ids: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits at the targets of three rows, the second of which has none."""
    generator = torch.Generator().manual_seed(student_ids)
    labels = torch.randint(0, min(student_ids, teacher_ids), (3, 40), generator=generator)
    labels[1] = -100
    labels[0, ::3] = -100
    targets = int((labels != -100).sum())
    student = 3 * torch.randn(targets, student_ids, generator=generator)
    teacher = student[:, :1] + 3 * torch.randn(targets, teacher_ids, generator=generator)
    # Some confidence, and some of it deserved.
    student[torch.arange(0, targets, 2), labels[labels != -100][::2]] += 5
    teacher[:, : min(student_ids, teacher_ids)] += student[:, :teacher_ids]
    return student.to(dtype), teacher.to(dtype), labels


def figures(sums: dict[str, torch.Tensor]) -> dict[str, float]:
    sums = sums | {"bytes": torch.tensor(BYTES)}
    found: dict[str, float] = {}
    for kind in METRICS:
        found |= kind().compute(**{name: sums[name].numpy() for name in kind.columns})
    return found


@pytest.mark.parametrize(
    ("student_ids", "teacher_ids", "shared", "dtype"),
    [
        (11, 11, 11, torch.float32),
        (11, 16, 11, torch.float32),  # padded teacher
        (16, 11, 11, torch.float32),  # padded student
        (16, 16, 9, torch.float32),  # both padded beyond the tokenizer
        (12, 12, 12, torch.bfloat16),
    ],
)
def test_figures_equal_the_oracle(
    student_ids: int, teacher_ids: int, shared: int, dtype: torch.dtype
) -> None:
    student, teacher, labels = batch(student_ids, teacher_ids, dtype)
    expected = oracle(
        student.double().numpy(),
        teacher.double().numpy(),
        labels[labels != -100].tolist(),
        shared,
    )
    assert figures(row_sums(student, teacher, labels, shared)) == pytest.approx(expected, rel=2e-6)
    assert 0.05 < expected["calibration_error"] < 0.9
    assert 0.2 < expected["top1_agreement"] < 1


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, labels = batch(11, 11)
    whole = row_sums(student, teacher, labels, 11)
    module = importlib.import_module("hf_distill.evaluation.row_sums")  # a function has its name
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 3 * 11)
    for name, value in row_sums(student, teacher, labels, 11).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-12, atol=0)


def test_rows_keep_their_own_sums() -> None:
    student, teacher, labels = batch(11, 11)
    together = row_sums(student, teacher, labels, 11)
    first = int((labels[0] != -100).sum())
    parts = [
        row_sums(student[:first], teacher[:first], labels[:1], 11),
        row_sums(student[:0], teacher[:0], labels[1:2], 11),  # no target: exactly zero
        row_sums(student[first:], teacher[first:], labels[2:], 11),
    ]
    for name, value in together.items():
        apart = torch.cat([part[name] for part in parts])
        assert apart.dtype == value.dtype
        torch.testing.assert_close(apart, value, rtol=1e-6, atol=0)
    assert not any(parts[1][name].any() for name in together)


def test_a_model_agrees_with_itself_exactly() -> None:
    student, _, labels = batch(11, 11, torch.bfloat16)
    found = figures(row_sums(student, student, labels, 7))
    assert (found["kl_to_teacher"], found["top1_agreement"]) == (0.0, 1.0)


def test_without_a_teacher_only_its_columns_are_missing() -> None:
    student, teacher, labels = batch(11, 11)
    alone, both = row_sums(student, None, labels, 11), row_sums(student, teacher, labels, 11)
    assert both.keys() - alone.keys() == {"kl", "agreed"}
    assert torch.equal(alone["nll"], both["nll"])


@pytest.mark.parametrize("kind", METRICS)
def test_order_and_batches_do_not_matter(kind: type[RowMetric]) -> None:
    dice = random.Random(0)
    number = 30

    def column(feature: Any) -> list[Any]:
        if hasattr(feature, "length"):
            return [[dice.uniform(0, 9) for _ in range(feature.length)] for _ in range(number)]
        return [10 ** dice.uniform(0, 6) for _ in range(number)]

    columns = {}
    for name, feature in kind.columns.items():
        kept = getattr(feature, "feature", feature).dtype
        columns[name] = np.array(column(feature)).astype(kept)
    at_once = kind().compute(**columns)
    order = list(range(number))
    dice.shuffle(order)
    metric = kind()
    for part in (order[:1], order[1:20], order[20:]):
        metric.add_batch(**{name: values[part] for name, values in columns.items()})
    assert metric.compute() == at_once
    # And a metric that was computed starts anew.
    assert metric.compute(**columns) == at_once


def test_metrics_leave_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import evaluate

    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    metrics = [Perplexity(), Perplexity()]  # two at the same time do not meet
    for index, metric in enumerate(metrics):
        metric.add_batch(nll=[1.0 + index], targets=[1])
    assert [m.compute()["ce"] for m in metrics] == [1.0, 2.0]
    assert not list(tmp_path.iterdir())


def test_known_values() -> None:
    perplexity = Perplexity().compute(nll=[math.log(8), math.log(2)], targets=[2, 0])
    assert perplexity["perplexity"] == pytest.approx(4)
    bits = BitsPerByte().compute(nll=[8 * math.log(2)], bytes=[4])
    assert bits == {"bits_per_byte": pytest.approx(2)}


def test_neighbouring_bins_are_kept_apart() -> None:
    confidences = torch.tensor([0.99, 0.9, 0.61, 0.59])  # 9 / 15 is 0.6, 14 / 15 is 0.93
    logits = torch.stack([confidences, 1 - confidences], dim=1).log()
    sums = row_sums(logits, None, torch.tensor([[1, 0, 0, 1]]), 2)
    assert sums["bin_count"].nonzero()[:, 1].tolist() == [8, 9, 13, 14]
    found = CalibrationError().compute(**{k: sums[k].numpy() for k in CalibrationError.columns})
    expected = (0.99 + 0.1 + 0.39 + 0.59) / 4
    assert found["calibration_error"] == pytest.approx(expected, rel=1e-6)


def test_what_has_no_answer_is_refused() -> None:
    student, teacher, labels = batch(11, 11)
    with pytest.raises(InputError, match="no target"):
        Perplexity().compute(nll=[0.0], targets=[0])
    with pytest.raises(InputError, match="the perplexity overflows"):
        Perplexity().compute(nll=[1000.0], targets=[1])
    with pytest.raises(InputError, match="special tokens only"):
        BitsPerByte().compute(nll=[1.0], bytes=[0])
    with pytest.raises(InputError, match="label is the token id 11"):
        row_sums(student, teacher, labels.where(labels != labels.max(), 11), 11)
    for shared in (0, 12):
        with pytest.raises(InputError, match=f"is {shared} ids.*between 1 and 11"):
            row_sums(student, teacher, labels, shared)


def test_bytes_of_targets_that_begin_with_a_space() -> None:
    """The first space counts after other text, and is none at the beginning of the text."""
    inputs = torch.tensor([[7, 8, 9], [2, 8, 9], [7, 8, 9]])  # 2 begins a text
    labels = torch.tensor([[8, 9, -100], [8, 9, -100], [-100, -100, -100]])
    assert text_bytes(labels, spaced_words(), inputs).tolist() == [6, 5, 0]


def test_bytes_of_the_text_that_targets_cover(tiny_tokenizer: Any) -> None:
    texts = ["the dog , don 't", "naïve café 日本", "row"]
    ids = [tiny_tokenizer(text).input_ids for text in texts]
    longest = max(map(len, ids)) + 2
    labels = torch.full((3, longest), -100)
    for row, row_ids in zip(labels, ids, strict=True):
        row[1 : len(row_ids) + 1] = torch.tensor(row_ids)
        row[len(row_ids) + 1] = tiny_tokenizer.eos_token_id  # spells nothing
    assert text_bytes(labels, tiny_tokenizer).tolist() == [len(t.encode()) for t in texts]
    labels[2] = -100
    labels[0, 1] = -100  # its first token, the byte "t" or more
    first = len(tiny_tokenizer.decode(ids[0][:1]))
    expected = [len(texts[0]) - first, len(texts[1].encode()), 0]
    assert text_bytes(labels, tiny_tokenizer).tolist() == expected
