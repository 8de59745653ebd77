"""Layers by block influence: the scores, the choice, the rows, and the report."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
import transformers as hf
from test_from_teacher import DEPTH, FAMILIES, build, logits, stacks_of
from torch import Tensor, nn

from hf_distill.errors import InputError
from hf_distill.models.from_scratch import train_tokenizer
from hf_distill.models.from_teacher import student_and_report, student_from_teacher

ROWS = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16, 17, 18, 19, 3]]


def cosine(a: Tensor, b: Tensor) -> float:
    """In float64, of two vectors, by its definition."""
    dot = sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))
    norms = [math.sqrt(sum(x * x for x in v.tolist())) for v in (a, b)]
    return dot / (norms[0] * norms[1])


@torch.no_grad()
def by_hand(model: Any, rows: list[dict[str, Tensor]]) -> list[list[float]]:
    """1 - mean cosine between what each block is given and what it returns, by stack."""
    seen: dict[nn.Module, list[float]] = {}

    def note(block: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        made = out if isinstance(out, Tensor) else out[0]
        pairs = zip(given[0], made[0], strict=True)
        seen.setdefault(block, []).extend(cosine(a, b) for a, b in pairs)

    stacks = stacks_of(model)
    for stack in stacks:
        for block in stack:
            block.register_forward_hook(note, with_kwargs=True)
    for row in rows:
        model(**row)
    return [[1 - sum(seen[block]) / len(seen[block]) for block in stack] for stack in stacks]


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "bert_classifier", "t5", "bart"])
def test_scores_are_those_of_a_hand_computation(family: str) -> None:
    teacher = build(family).double()
    rows: list[dict[str, Any]] = [{"input_ids": ids} for ids in ROWS]
    given = [{"input_ids": torch.tensor([ids])} for ids in ROWS]
    if teacher.config.is_encoder_decoder:
        rows = [{"input_ids": ids, "labels": ids[::-1][:3]} for ids in ROWS]
        start = teacher.config.decoder_start_token_id
        given = [
            row | {"decoder_input_ids": torch.tensor([[start, *ids[::-1][:2]]])}
            for row, ids in zip(given, ROWS, strict=True)
        ]
    expected = by_hand(copy.deepcopy(teacher), given)
    student, report = student_and_report(teacher, "influence", num_layers=2, rows=rows)
    found = list(report.influence.values())
    assert len(found) == len(expected)
    for scores, hand in zip(found, expected, strict=True):
        assert scores == pytest.approx(hand, abs=1e-12)
        assert len(set(hand)) == DEPTH
    removed = [sorted(sorted(range(DEPTH), key=hand.__getitem__)[:2]) for hand in expected]
    assert list(report.removed_layers.values()) == removed
    layers = dict(zip(report.removed_layers, ([0, 1, 2, 3] for _ in removed), strict=True))
    kept = {name: [i for i in layers[name] if i not in report.removed_layers[name]]
            for name in layers}  # fmt: skip
    assert torch.equal(logits(student), logits(student_from_teacher(teacher, kept)))


def test_padding_does_not_count() -> None:
    teacher = build("llama")
    plain = [{"input_ids": ids} for ids in ROWS]
    padded = [
        {"input_ids": [0, 0, *ids, 0], "attention_mask": [0, 0] + [1] * len(ids) + [0]}
        for ids in ROWS
    ]
    (one, other) = (
        student_and_report(teacher, "influence", num_layers=2, rows=rows)[1]
        for rows in (plain, padded)
    )
    assert one == other


@torch.no_grad()
def test_the_report() -> None:
    teacher = build("gpt2")
    labels = [[-100, *ids[1:-1], -100] for ids in ROWS]
    rows = [{"input_ids": i, "labels": k} for i, k in zip(ROWS, labels, strict=True)]
    student, report = student_and_report(teacher, "influence", num_layers=3, rows=rows)
    for model, stated in (
        (teacher, report.teacher_perplexity), (student, report.initial_perplexity)
    ):  # fmt: skip
        nats = [
            -model(torch.tensor([ids])).logits[0, i].double().log_softmax(-1)[ids[i + 1]].item()
            for ids in ROWS
            for i in range(len(ids) - 2)
        ]
        assert stated == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-5)
    assert report.parameters == student.num_parameters() < report.teacher_parameters
    assert json.loads(report.to_json())["removed_layers"] == report.removed_layers
    (removed,) = report.removed_layers["transformer.h"]
    assert f"removed layers of transformer.h: {removed}" in report.render()
    assert "perplexity before training" in report.render()


def test_without_rows_nothing_is_run() -> None:
    teacher = build("gpt2")
    teacher.forward = None  # type: ignore[assignment]
    report = student_and_report(teacher, [0])[1]
    assert (report.influence, report.initial_perplexity) == ({}, None)


def test_one_side_of_an_encoder_decoder() -> None:
    rows = [{"input_ids": ids, "labels": ids} for ids in ROWS]
    student = student_from_teacher(build("bart"), {"decoder": "influence"}, num_layers=1, rows=rows)
    assert (student.config.encoder_layers, student.config.decoder_layers) == (DEPTH, 1)


def test_texts() -> None:
    words = ["rose iris ivy fern", "ivy fern moss rose rose", "fern"]
    tokenizer = train_tokenizer(words * 9, 262)
    config = copy.deepcopy(FAMILIES["gpt2"][1])
    config.vocab_size = 262
    teacher = hf.GPT2LMHeadModel(config)
    reports = [
        student_and_report(teacher, "influence", num_layers=2, rows=rows, tokenizer=tokenizer)[1]
        for rows in (words, [tokenizer(text) for text in words])
    ]
    assert reports[0] == reports[1]


def test_the_teacher_is_as_it_was() -> None:
    teacher = build("gpt2").train()
    student_from_teacher(teacher, "influence", rows=[{"input_ids": ids} for ids in ROWS])
    assert teacher.training
    assert not any(module._forward_hooks for module in teacher.modules())


ROW = {"input_ids": [1, 2, 3]}


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("gpt2", {}, "give rows"),
        ("gpt2", {"rows": []}, "rows is empty"),
        ("gpt2", {"rows": "text"}, "one text"),
        ("gpt2", {"rows": ["text"]}, "give tokenizer"),
        ("gpt2", {"rows": [{"text": "a"}]}, "has 'text', but not 'input_ids'"),
        ("gpt2", {"rows": [{"input_ids": [[1, 2]]}]}, r"have the shape \(1, 2\)"),
        ("gpt2", {"rows": [{"input_ids": [99]}]}, "has the token id 99"),
        ("gpt2", {"rows": [{"input_ids": [1] * 40}]}, "40 tokens, but the teacher takes 32"),
        ("gpt2", {"rows": [ROW], "num_layers": 5}, "num_layers=5 cannot be taken from the 4"),
        ("gpt2", {"rows": [ROW], "num_layers": 0}, "give 1 to 4"),
        ("t5", {"rows": [ROW]}, "has no 'labels'"),
        ("bart", {"rows": ["text"], "tokenizer": True}, "needs targets too"),
    ],
)  # fmt: skip
def test_refused_rows(family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        student_from_teacher(build(family), "influence", **options)
    assert "\n" not in str(caught.value)
