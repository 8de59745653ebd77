"""Each on-policy method, one step of the trainer beside its paper's formula in float64."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import torch
from datasets import Dataset
from on_policy_setup import Watching, by_hand, check_step, make, one_step
from peft import LoraConfig, get_peft_model
from torch import Tensor
from trainer_setup import make_rows, small_model
from writing_setup import END, writer

from hf_distill import InputError, record
from hf_distill.data import Collator
from hf_distill.losses.policy_gradient import drawn_labels
from hf_distill.losses.signals import Logits
from hf_distill.models.generation import PLAIN, Generator
from hf_distill.models.mixture import Mixture
from hf_distill.teachers import AdapterTeacher

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


@pytest.mark.parametrize("size", [1, 4])
def test_recordings_of_the_evaluation_set_alone(size: int, tmp_path: Path) -> None:
    """The live teacher is then asked at all rows, and the step is that without recordings."""
    held_out = record(
        Dataset.from_list(make_rows(4, 9)), small_model(2), tmp_path / "r", kind="full",
        data_collator=COLLATE,
    )  # fmt: skip
    losses, gradients = [], []
    for more in ({}, {"eval_dataset": held_out}):
        _, log, gradient = one_step(
            tmp_path, data_collator=COLLATE, on_policy=0.5, alpha=0.7,
            per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, **more,
        )  # fmt: skip
        losses.append(log["loss"])
        gradients.append(gradient)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-3, atol=1e-6)


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


def test_drawn_tokens_have_the_gradient_of_the_reverse_kl_on_average() -> None:
    """Over all tokens, each weighted by its probability; at another temperature they have not."""
    generator = torch.Generator().manual_seed(0)
    z, t = (torch.randn(9, generator=generator, dtype=torch.float64) for _ in range(2))
    z.requires_grad_()
    q, p = z.softmax(-1), t.softmax(-1)
    (exact,) = torch.autograd.grad((q * (q.log() - p.log())).sum(), z, retain_graph=True)
    weighted = [q[i].detach() * drawn_token(q, p, i) for i in range(9)]
    (mean,) = torch.autograd.grad(torch.stack(weighted).sum(), z)
    assert (mean - exact).abs().max() < 1e-12


@pytest.mark.parametrize("fused", [True, False])
def test_drawn_tokens_with_their_advantage(fused: bool, tmp_path: Path) -> None:
    teacher = small_model(1, layers=2)
    seen, log, gradient = one_step(
        tmp_path, alpha=1.0, teacher=teacher, on_policy=1.0, on_policy_divergence="drawn_token",
        fused_head=fused,
    )  # fmt: skip
    expected = by_hand(small_model(0), seen, lambda _: (teacher, drawn_token))

    def estimate(q: Tensor, p: Tensor, label: int) -> Tensor:
        return q[label].log() - p[label].log()

    value, _ = by_hand(small_model(0), seen, lambda _: (teacher, estimate))
    # What is logged is the estimate of the reverse KL.
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
    rows, found = logits.detach().expand(12, 12), torch.zeros(1, 12).double()
    labels = torch.arange(12)
    drawn = drawn_labels(Logits(rows), Logits(theirs.expand(12, 12)), labels, 1.0, 12)
    signal = drawn.signal(drawn.own_advantages())
    for label in range(12):
        leaf = logits.detach().clone().requires_grad_()
        log_q = leaf.log_softmax(-1).gather(1, signal.ids[label : label + 1])
        (gradient,) = torch.autograd.grad(signal[label : label + 1].value(log_q).sum(), leaf)
        found += q[0, label].detach() * gradient
    torch.testing.assert_close(found, wanted)


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


@pytest.mark.parametrize(("share", "form"), [(1.0, None), (0.5, None), (0.5, "torch")])
def test_the_teacher_reads_its_own_prompt(share: float, form: Any, tmp_path: Path) -> None:
    teacher, rows = small_model(1), make_rows(8, 0)
    more: dict[tuple[int, ...], list[int]] = {}
    for number, row in enumerate(rows):
        row["labels"] = [-100, -100, *row["input_ids"][2:]]
        row["teacher_prompt_ids"] = [3 + number, 4, 5, *row["input_ids"][:2]]
        more[tuple(row["input_ids"][:2])] = row["teacher_prompt_ids"]
    data = Dataset.from_list(rows).with_format(form)
    seen, log, gradient = one_step(
        tmp_path, rows=data, teacher=teacher, on_policy=share, alpha=0.7, data_collator=COLLATE,
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


# ---- MiniLLM ----


def minillm(
    student: Any, teacher: Any, rows: list[dict[str, Any]], mix: float
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of equation 9 of 2306.08543 in float64, token by token, on written rows."""
    student, teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    surrogate, value, targets = torch.zeros(()).double(), 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        start = next(i for i, label in enumerate(row["labels"]) if label != -100)
        q = student(input_ids=ids).logits[0].softmax(-1)
        p = teacher(input_ids=ids).logits[0].softmax(-1).detach()
        places = range(start - 1, ids.shape[1] - 1)  # of the predictions
        ratio = (p / q).detach()
        reward = {at: float(ratio[at, ids[0, at + 1]].log()) for at in places}
        for at in places:
            token = ids[0, at + 1]
            later = [reward[further] for further in places if further > at]
            back = sum(later) / len(later) if later else 0.0
            drawn_from = mix * p[at, token] + (1 - mix) * q[at, token]
            weight = float(q[at, token].detach() / drawn_from.detach())
            single = (q[at] * (p[at] / q[at]).log()).sum()
            surrogate = surrogate - weight * (single + back * q[at, token].log())
            value -= weight * (float(single.detach()) + back)
            targets += 1
    (surrogate / targets).backward()
    gradient = {n: x.grad.float() for n, x in student.named_parameters() if x.grad is not None}
    return value / targets, gradient


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("mix", [0.0, 0.4])
def test_minillm(mix: float, fused: bool, tmp_path: Path) -> None:
    teacher = small_model(1, layers=2, vocab_size=48)
    seen, log, gradient = one_step(
        tmp_path, alpha=1.0, teacher=teacher, on_policy=1.0, teacher_mix=mix, fused_head=fused,
        on_policy_divergence="sequence_reverse_kl", per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )  # fmt: skip

    class Shared(torch.nn.Module):  # the teacher's ids that the student has too
        def forward(self, input_ids: Tensor) -> Any:
            found = teacher.double()(input_ids=input_ids)
            return SimpleNamespace(logits=found.logits[..., :40])

    value, by_name = minillm(small_model(0), Shared(), seen, mix)
    teacher.float()
    assert log["loss"] == pytest.approx(value, rel=1e-3)
    parts = log["written_sequence_reverse_kl"] + log["written_returns"]
    assert parts == pytest.approx(value, rel=1e-3)
    for name, wanted in by_name.items():
        torch.testing.assert_close(gradient[name], wanted, rtol=2e-3, atol=2e-5)


def test_texts_are_drawn_from_the_mixture_of_both_models() -> None:
    """Each token once more from whole forwards in float64, without caches and padding."""
    student, teacher, mix, shared = small_model(0), small_model(1, vocab_size=48), 0.5, 40
    mixture = Mixture(teacher, mix, shared, nullcontext)
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": 8}
    generator = Generator(student, settings, pad_token_id=0, mixture=mixture)
    alone = Generator(student, settings, pad_token_id=0)
    prompts, seeds = [[5], [6, 7, 8], [9, 10, 11, 12]], [[3], [4], [5]]
    written = [ids for ids, _ in generator.texts(prompts, seeds)]
    assert written != [ids for ids, _ in alone.texts(prompts, seeds)]
    student, teacher = student.double(), teacher.double()
    for prompt, (seed,), ids in zip(prompts, seeds, written, strict=True):
        draws = torch.Generator().manual_seed(seed)
        for number, token in enumerate(ids):
            before = torch.tensor([prompt + ids[:number]])
            with torch.no_grad():
                q = student(input_ids=before).logits[0, -1].softmax(-1)
                p = teacher(input_ids=before).logits[0, -1, :shared].softmax(-1)
            sums = (mix * p + (1 - mix) * q).cumsum(0)
            at = torch.rand(1, generator=draws, dtype=torch.float64) * sums[-1]
            assert int(torch.searchsorted(sums, at, right=True)) == token


class Own:
    """A teacher of one's own, which has a signal but no model."""

    name, rows, tokenizer = "own", 40, None

    def prepare(self, *_: Any, **__: Any) -> None: ...

    def signal(self, *_: Any) -> Logits: ...


def test_what_draws_of_a_restricted_distribution_would_falsify_is_refused(tmp_path: Path) -> None:
    for options, message in (
        ({"teacher_mix": 1.0}, "teacher_mix is 1.0, but must be at least 0, below 1"),
        ({"teacher_mix": 0.2, "top_p": 0.9}, "top_p is 0.9, but must be 1 with teacher_mix"),
        ({"on_policy_divergence": "drawn_token", "replay": 0.5}, "replay is 0.5, but must be 0"),
        ({"on_policy_divergence": "sequence_reverse_kl", "temperature": 2.0}, "must be 1 with"),
        ({"on_policy_divergence": "drawn_token", "temperature": 2.0}, "must be 1 with"),
    ):
        with pytest.raises(InputError, match=message):
            make(tmp_path, on_policy=1.0, **options)
    with pytest.raises(InputError, match="needs a teacher that is a model"):
        make(tmp_path, teacher=Own(), on_policy=1.0, teacher_mix=0.2, max_steps=1).train()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_student_without_its_adapter_can_have_a_share_in_what_it_writes(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(small_model(0), config)
    options: dict[str, Any] = {"on_policy": 1.0, "max_steps": 1, "teacher_mix": 0.5}
    make(tmp_path, model=model, teacher=AdapterTeacher(model), **options).train()
    assert model.active_adapters == ["default"]


def test_an_encoder_decoders_own_settings_do_not_change_its_text() -> None:
    """BART's default ends a text at the limit; its last token would be no draw."""
    model = writer("bart")
    model.final_logits_bias[0, END] = -50.0
    own = model.generation_config
    own.forced_eos_token_id, own.min_length = END, 9
    made = Generator(model, {**PLAIN, "max_new_tokens": 5}, pad_token_id=1)
    ((text,),) = made.write([[5, 6, 7]], [[1]])
    assert len(text.ids) == 5
    assert END not in text.ids
    assert not text.finished
    assert model.generation_config is own
    model.final_logits_bias[0, END] = 50.0
    ((text,),) = made.write([[5, 6, 7]], [[1]])
    assert text.ids == [END], "no least length"


def test_a_teachers_prompt_without_text_of_the_student_is_refused(tmp_path: Path) -> None:
    rows = [{"input_ids": [3, 4, 5], "labels": [-100, 4, 5], "teacher_prompt_ids": [6, 7]}] * 4
    with pytest.raises(InputError, match="train_dataset has 'teacher_prompt_ids', .* on_policy is"):
        make(tmp_path, rows=rows)
