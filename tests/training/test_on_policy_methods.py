"""Each on-policy method, one step of the trainer beside its paper's formula in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from datasets import Dataset
from on_policy_setup import Watching, by_hand, check_step, make, one_step
from torch import Tensor
from trainer_setup import make_rows, small_model

from hf_distill import InputError, record
from hf_distill.data import Collator
from hf_distill.losses.divergences import forward_kl
from hf_distill.losses.objective import Objective
from hf_distill.losses.parts import drawn_tokens
from hf_distill.losses.signals import Logits

COLLATE = Collator(1, 0)


def divergence(name: str) -> Any:
    def of_target(q: Tensor, p: Tensor, _: int) -> Tensor:
        return oracle.divergence(name, q, p)

    return of_target


def test_data_rows_keep_their_recording_and_written_rows_ask_the_live_teacher(
    tmp_path: Path,
) -> None:
    recorded, live = small_model(2), small_model(1, layers=2)
    rows = record(
        Dataset.from_list(make_rows(8, 0)), recorded, tmp_path / "r", kind="full",
        data_collator=COLLATE,
    )  # fmt: skip
    seen, log, gradient = one_step(
        tmp_path, rows=rows, data_collator=COLLATE, teacher=live, on_policy=0.5, alpha=0.7,
        per_device_train_batch_size=2, gradient_accumulation_steps=4,
    )  # fmt: skip
    own = [row for row in seen if not row["ce_weight"]]
    assert 0 < len(own) < 8
    kl = divergence("forward_kl")
    expected = by_hand(
        small_model(0), seen, lambda row: (recorded if row["ce_weight"] else live, kl), alpha=0.7
    )
    check_step(log, gradient, expected)
    others = [row for row in seen if row["ce_weight"]]
    for name, some, teacher in (
        ("written_forward_kl", own, live),
        ("forward_kl", others, recorded),
    ):
        part, _ = by_hand(small_model(0), some, lambda _, teacher=teacher: (teacher, kl))
        assert log[name] == pytest.approx(part, rel=1e-3)


def test_recordings_alone_cannot_judge_what_is_written(tmp_path: Path) -> None:
    rows = record(
        Dataset.from_list(make_rows(8, 0)), small_model(1), tmp_path / "r", kind="full",
        data_collator=COLLATE,
    )  # fmt: skip
    trainer = make(tmp_path, rows=rows, data_collator=COLLATE, teacher=None, on_policy=0.5)
    with pytest.raises(InputError, match="live teacher .* beside the recordings"):
        trainer.train()


# ---- Methods ----


@pytest.mark.parametrize(
    "options",
    [
        {"divergence": "jsd", "beta": oracle.BETA, "on_policy": 0.5},  # GKD
        {"divergence": "reverse_kl", "on_policy": 1.0},
        {"divergence": "skew_forward_kl", "skew": oracle.SKEW, "on_policy": 0.5},  # DistiLLM
    ],
    ids=lambda options: options["divergence"],
)
def test_full_vocabulary_methods(options: dict[str, Any], tmp_path: Path) -> None:
    teacher = small_model(1, vocab_size=48)  # ids beyond the tokenizer's
    seen, log, gradient = one_step(tmp_path, alpha=1.0, teacher=teacher, **options)
    assert any(not row["ce_weight"] for row in seen)
    judge = (teacher, divergence(options["divergence"]))
    check_step(log, gradient, by_hand(small_model(0), seen, lambda _: judge, shared=40))


def drawn_token(q: Tensor, p: Tensor, label: int) -> Tensor:
    """-A log q of the drawn token, with the advantage A = log p - log q as a constant."""
    advantage = (p[label].log() - q[label].log()).detach()
    return -advantage * q[label].log()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("fused", [True, False])
def test_drawn_tokens_with_their_advantage(temperature: float, fused: bool, tmp_path: Path) -> None:
    teacher = small_model(1, layers=2)
    seen, log, gradient = one_step(
        tmp_path, alpha=1.0, teacher=teacher, on_policy=1.0, on_policy_divergence="drawn_token",
        temperature=temperature, fused_head=fused,
    )  # fmt: skip
    expected = by_hand(
        small_model(0), seen, lambda _: (teacher, drawn_token), temperature=temperature
    )

    def estimate(q: Tensor, p: Tensor, label: int) -> Tensor:
        return q[label].log() - p[label].log()

    value, _ = by_hand(small_model(0), seen, lambda _: (teacher, estimate))
    if temperature == 1.0:  # what is logged is the estimate of the reverse KL
        assert log["written_drawn_token"] == pytest.approx(value, rel=1e-3)
        assert log["loss"] == pytest.approx(value, rel=1e-3)
    _, by_name = expected
    for name, wanted in by_name.items():
        assert (gradient[name] - wanted).abs().max() < 1e-4


def test_the_drawn_tokens_estimate_the_gradient_of_the_reverse_kl() -> None:
    """Its mean over the tokens that the student can draw is that gradient exactly."""
    torch.manual_seed(0)
    logits, theirs = torch.randn(1, 12).double().requires_grad_(), torch.randn(1, 12).double()
    q = logits.softmax(-1)
    whole = (q * (q.log() - theirs.log_softmax(-1))).sum()
    (wanted,) = torch.autograd.grad(whole, logits)
    objective = Objective(1.0, 1.0, forward_kl, "any", 12)
    rows, found = logits.detach().expand(12, 12), torch.zeros(1, 12).double()
    labels = torch.arange(12)
    signal = drawn_tokens(Logits(rows), Logits(theirs.expand(12, 12)), labels, objective)
    for label in range(12):
        leaf = logits.detach().clone().requires_grad_()
        log_q = leaf.log_softmax(-1).gather(1, signal.ids[label : label + 1])
        (gradient,) = torch.autograd.grad(signal[label : label + 1].value(log_q).sum(), leaf)
        found += q[0, label].detach() * gradient
    torch.testing.assert_close(found, wanted)
    assert objective.alpha == 1.0


def test_two_skewed_sides(tmp_path: Path) -> None:
    """DistiLLM-2: skewed forward KL on the data rows, skewed reverse KL on the student's text."""
    teacher = small_model(1)
    seen, log, gradient = one_step(
        tmp_path, alpha=0.8, teacher=teacher, on_policy=0.5, divergence="skew_forward_kl",
        on_policy_divergence="skew_reverse_kl", skew=oracle.SKEW,
        per_device_train_batch_size=2, gradient_accumulation_steps=4,
    )  # fmt: skip
    assert {bool(row["ce_weight"]) for row in seen} == {True, False}

    def judge(row: dict[str, Any]) -> Any:
        return teacher, divergence("skew_forward_kl" if row["ce_weight"] else "skew_reverse_kl")

    check_step(log, gradient, by_hand(small_model(0), seen, judge, alpha=0.8))
    assert log["skew_forward_kl"] > 0
    assert log["written_skew_reverse_kl"] > 0


# ---- A teacher that sees more ----


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_teacher_reads_its_own_prompt(share: float, tmp_path: Path) -> None:
    teacher, rows = small_model(1), make_rows(8, 0)
    more: dict[tuple[int, ...], list[int]] = {}
    for number, row in enumerate(rows):
        row["labels"] = [-100, -100, *row["input_ids"][2:]]
        row["teacher_prompt_ids"] = [3 + number, 4, 5, *row["input_ids"][:2]]
        more[tuple(row["input_ids"][:2])] = row["teacher_prompt_ids"]
    seen, log, gradient = one_step(
        tmp_path, rows=rows, teacher=teacher, on_policy=share, alpha=0.7, data_collator=COLLATE,
        divergence="reverse_kl", per_device_train_batch_size=4, gradient_accumulation_steps=2,
    )  # fmt: skip
    assert len({bool(row["ce_weight"]) for row in seen}) == (1 if share == 1.0 else 2)
    expected = by_hand(
        small_model(0),
        seen,
        lambda _: (teacher, divergence("reverse_kl")),
        alpha=0.7,
        seen_by_teacher=lambda row: more[tuple(row["input_ids"][:2])] + row["input_ids"][2:],
    )
    check_step(log, gradient, expected)


def test_raw_prompts_of_a_teacher(tmp_path: Path, tiny_tokenizer: Any) -> None:
    models = [small_model(seed, vocab_size=300, n_positions=64) for seed in (0, 1)]
    read: list[str] = []

    class Asking(Watching):
        def teacher_inputs(self, inputs: Any) -> Any:
            read.extend(tiny_tokenizer.batch_decode(inputs["input_ids"]))
            return inputs

    rows = [{"prompt": "the quick", "teacher_prompt": "a dog said: the quick"}] * 4
    options: dict[str, Any] = {
        "model": models[0], "teacher": models[1], "data_collator": None, "kind": Asking,
        "processing_class": tiny_tokenizer, "on_policy": 1.0, "max_steps": 1,
    }  # fmt: skip
    make(tmp_path, rows=rows, **options).train()
    assert len(read) == 4
    assert all(text.startswith("a dog said: the quick") for text in read)
    with pytest.raises(InputError, match="leave out the column 'completion'"):
        make(tmp_path, rows=[row | {"completion": "x"} for row in rows], **options)
    with pytest.raises(InputError, match="leave out recordings and replay"):
        make(tmp_path, rows=rows, replay=0.5, **options).train()
