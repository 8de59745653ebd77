"""`evaluate_written` against texts and figures worked out token by token in float64."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from evaluation_setup import PROMPTED, WORDS, tokenizer
from trainer_setup import small_model

from hf_distill import evaluate_written
from hf_distill.data.text_figures import length_and_variety
from hf_distill.errors import InputError
from hf_distill.evaluation.continuations import split_row
from hf_distill.evaluation.own_text import OwnText

OPTIONS: dict[str, Any] = {"max_new_tokens": 7, "prompt_tokens": 3, "seed": 5}


def pair(architecture: str = "gpt2", **teacher: Any) -> tuple[Any, Any]:
    """Models whose likeliest tokens differ, and which end some texts."""
    models = small_model(3, architecture), small_model(4, architecture, layers=2, **teacher)
    for model in models:
        with torch.no_grad():
            model.get_input_embeddings().weight[0] *= 1.5
    return models


def evaluate(model: Any, teacher: Any, rows: Any = PROMPTED, **options: Any) -> Any:
    return evaluate_written(model, teacher, rows, tokenizer(), **OPTIONS | options)


def probabilities(model: Any, ids: list[int], shared: int = 40) -> torch.Tensor:
    """The distribution of the next token, alone in its batch and without a cache."""
    found = model(torch.tensor([ids])).logits[0, -1, :shared].softmax(-1)
    return found / found.sum()


@torch.no_grad()
def written(model: Any, prompts: Sequence[list[int]], most: int = 7) -> list[list[int]]:
    """Each text drawn by the inverse of the cumulative distribution."""
    texts = []
    for row, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(zlib.crc32(f"5 {row}".encode()))
        text: list[int] = []
        while len(text) < most and text[-1:] != [0]:
            sums = probabilities(model, prompt + text).cumsum(-1)
            at = torch.rand(1, generator=generator, dtype=torch.float64)
            text.append(int((sums <= at * sums[-1]).sum()))
        texts.append(text)
    return texts


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    lengths = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for at, other in enumerate(b, 1):
            before, lengths[at] = (
                lengths[at],
                max(before + 1 if word == other else lengths[at], lengths[at - 1]),
            )
    return lengths[-1]


def rouge_l(text: list[int], reference: list[int]) -> float:
    ours, theirs = ([WORDS[i] for i in ids if i > 1] for ids in (text, reference))
    common = longest_common(ours, theirs)
    return 2 * common / (len(ours) + len(theirs))


@torch.no_grad()
def oracle(
    model: Any, teacher: Any, rows: Sequence[Any] = PROMPTED, shared: int = 40
) -> dict[str, float]:
    model, teacher = (copy.deepcopy(one).double().eval() for one in (model, teacher))
    prompts = [row["input_ids"][:2] for row in rows]
    texts = written(model, prompts)
    sums = dict.fromkeys(("log_prob", "teacher_log_prob", "reverse_kl", "agreement"), 0.0)
    for prompt, text in zip(prompts, texts, strict=True):
        for place, token in enumerate(text):
            q, p = (probabilities(m, prompt + text[:place], shared) for m in (model, teacher))
            sums["log_prob"] += math.log(q[token])
            sums["teacher_log_prob"] += math.log(p[token])
            sums["reverse_kl"] += float((q * (q / p).log()).sum())
            sums["agreement"] += int(q.argmax() == p.argmax())
    tokens = sum(map(len, texts))
    pairs = [list(pairwise(text)) for text in texts]
    repeated = [1 - len(set(of)) / len(of) if of else 0.0 for of in pairs]
    together = [one for of in pairs for one in of]
    references = [row["input_ids"][2:] for row in rows]
    scores = [rouge_l(text, true) for text, true in zip(texts, references, strict=True)]
    return {
        **{f"written_{name}": value / tokens for name, value in sums.items()},
        "written_tokens": tokens / len(texts),
        "written_cut": sum(text[-1] != 0 for text in texts) / len(texts),
        "written_repetition": sum(repeated) / len(texts),
        "written_distinct": len(set(together)) / len(together),
        "written_rougeL": sum(scores) / len(scores),
    }


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_figures_equal_the_oracle(architecture: str) -> None:
    model, teacher = pair(architecture)
    expected = oracle(model, teacher)
    found = evaluate(model, teacher, batch_size=4)
    assert found == pytest.approx(expected, rel=2e-5)
    assert found["written_reverse_kl"] > 0.005
    if architecture == "gpt2":
        assert 0 < found["written_cut"] < 1
        assert 0 < found["written_agreement"] < 1


def test_ids_that_the_teacher_lacks_are_never_written() -> None:
    model, teacher = small_model(3, vocab_size=48), small_model(4, vocab_size=36)
    ids = [[2 + token % 34 for token in row["input_ids"]] for row in PROMPTED]
    rows = [{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in ids]
    # A model without the ids that are not shared draws from the same distributions.
    smaller = small_model(3, vocab_size=36)
    weights = model.state_dict()
    weights |= {name: weights[name][:36] for name in ("transformer.wte.weight", "lm_head.weight")}
    smaller.load_state_dict(weights)
    assert evaluate(model, teacher, rows) == pytest.approx(
        oracle(smaller, teacher, rows, 36), rel=2e-5
    )


@pytest.mark.parametrize("batch_size", [1, 13])
def test_neither_batches_nor_the_generation_config_matter(batch_size: int) -> None:
    model, teacher = pair()
    before = evaluate(model, teacher, batch_size=4)
    model.generation_config.update(
        do_sample=True, temperature=0.3, top_p=0.5, top_k=3, repetition_penalty=1.5
    )
    again = evaluate(model, teacher, batch_size=batch_size)
    assert again == pytest.approx(before, rel=1e-5)
    assert again.predictions.texts == before.predictions.texts
    assert model.training


def test_a_teacher_agrees_with_its_own_text() -> None:
    _, teacher = pair()
    found = evaluate(teacher, teacher)
    assert found["written_reverse_kl"] == 0
    assert found["written_agreement"] == 1
    assert found["written_teacher_log_prob"] == found["written_log_prob"]
    alone = evaluate(teacher, None)
    assert alone == {name: found[name] for name in alone}
    assert found.keys() - alone.keys() == {
        "written_teacher_log_prob", "written_reverse_kl", "written_agreement",
    }  # fmt: skip


def test_the_reference_itself_has_the_full_score() -> None:
    model, teacher = pair()
    greedy = evaluate(model, teacher, sampling_temperature=0, max_new_tokens=4)
    texts = [[WORDS.index(word) for word in t.split()] for t in greedy.predictions.texts]
    rows = [
        {"input_ids": row["input_ids"][:2] + ids, "labels": [-100, -100, *ids]}
        for row, ids in zip(PROMPTED, texts, strict=True)
    ]
    again = evaluate(model, teacher, rows, sampling_temperature=0, max_new_tokens=4)
    assert again["written_rougeL"] == 1
    assert again.predictions.references == greedy.predictions.texts
    assert set(again.predictions.scores) == {1.0}
    # The greedy text is the likeliest at each place, so that a drawn one is less likely.
    assert again["written_log_prob"] > evaluate(model, teacher)["written_log_prob"]


def test_rows_without_a_reference_are_written_too() -> None:
    model, teacher = pair()
    rows = [{"input_ids": [5, 6, 7], "labels": [-100] * 3}, *PROMPTED[:2]]
    found = evaluate(model, teacher, rows)
    assert math.isnan(found.predictions.scores[0])
    assert 0 <= found["written_rougeL"] <= 1
    assert "written_rougeL" not in evaluate(model, teacher, rows[:1])


@pytest.mark.parametrize(
    ("row", "prompt", "reference"),
    [
        ({"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, [5, 6], [7, 8]),
        ({"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, -100]}, [5, 6], [7]),
        ({"input_ids": [5, 6, 7, 8, 9]}, [5, 6], [7, 8]),  # plain text
        ({"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}, [5, 6], [7, 8]),
        ({"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, -100]}, [5, 6], [7]),  # packed
        ({"input_ids": [1, 5, 6, 7], "attention_mask": [0, 1, 1, 1]}, [5, 6], [7]),
        ({"input_ids": [5, 6]}, [5], [6]),
        ({"input_ids": [5]}, [5], []),
    ],
)
def test_prompt_and_reference(row: Any, prompt: list[int], reference: list[int]) -> None:
    assert split_row(row, 2, 2) == (prompt, reference)


def test_length_and_variety() -> None:
    found = length_and_variety([[1, 2, 1, 2], [3]], [False, True])
    assert found["written_repetition"] == pytest.approx(1 / 6)
    assert (found["written_tokens"], found["written_cut"]) == (2.5, 0.5)
    assert found["written_distinct"] == pytest.approx(2 / 3)
    assert length_and_variety([], []) == {}


def test_texts_end_at_the_last_position() -> None:
    model, teacher = small_model(3), small_model(4, n_positions=6)
    found = evaluate(model, teacher, [{"input_ids": [2, 3, 4, 5], "labels": [2, 3, 4, 5]}])
    assert found["written_tokens"] <= 3
    with pytest.raises(InputError, match="the teacher has only 6 positions"):
        evaluate(model, teacher, [{"input_ids": [7] * 9, "labels": [-100] * 8 + [7]}])


def test_bad_input_is_told() -> None:
    model, teacher = pair()
    with pytest.raises(InputError, match="there are no evaluation rows"):
        evaluate(model, teacher, [])
    with pytest.raises(InputError, match="no input_ids"):
        evaluate(model, teacher, [{"text": "a"}])
    measure = OwnText(tokenizer(), [[]], frozenset({0}), 40, [0])
    with pytest.raises(InputError, match="the reverse kl of a generated text is not finite"):
        measure.add({"reverse_kl": torch.tensor([float("nan")])})


def test_a_row_without_any_target_is_a_prompt() -> None:
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100] * 4}
    assert split_row(row, prompt_tokens=2) == ([5, 6, 7, 8], [])
    assert split_row(row | {"labels": [5, 6, 7, 8]}, 2, 1) == ([5, 6], [7])
    assert split_row(row | {"labels": [-100, -100, 7, -100]}, 1) == ([5, 6], [7])
