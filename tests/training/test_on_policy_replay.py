"""Written rows that are kept: as a data set, recorded, repeated, and over interruptions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from on_policy_setup import make, one_step, written_rows
from tasks_path import task_collate, task_rows
from trainer_setup import arguments, make_rows, small_model, weights
from transformers import TrainerCallback

import hf_distill
from hf_distill import InputError, record
from hf_distill.data import Collator
from hf_distill.training.on_policy.share import share_now

COLLATE = Collator(1, 0)


def plain(rows: Any) -> list[tuple[Any, ...]]:
    return sorted((tuple(row["input_ids"]), tuple(row["labels"])) for row in rows)


def test_kept_rows_are_those_that_were_written(tmp_path: Path) -> None:
    trainer = make(tmp_path, on_policy=0.5, max_steps=4, keep_rows=True)
    trainer.train()
    kept = hf_distill.written_rows(tmp_path)
    written = [row for row in written_rows(trainer.seen) if not row["ce_weight"]]
    assert len(kept) > 2
    assert plain(kept) == plain(written)
    assert sorted(kept["step"]) == kept["step"]
    assert set(kept["step"]) <= {1, 2, 3, 4}
    assert set(kept["ce_weight"]) == {0.0}
    for row in kept:
        assert row["finished"] is (row["input_ids"][-1] == 0)
    # Both epochs have the same prompts.
    assert len(set(kept["prompt_id"])) < len(kept)


def test_without_keeping_there_is_nothing(tmp_path: Path) -> None:
    make(tmp_path, on_policy=0.5, max_steps=1).train()
    with pytest.raises(InputError, match="holds no written_rows.jsonl"):
        hf_distill.written_rows(tmp_path)


def test_kept_rows_have_their_text(tmp_path: Path, tiny_tokenizer: Any) -> None:
    models = [small_model(seed, vocab_size=300, n_positions=64) for seed in (0, 1)]
    trainer = make(
        tmp_path, model=models[0], teacher=models[1], rows=[{"prompt": "the quick"}] * 4,
        data_collator=None, processing_class=tiny_tokenizer, on_policy=1.0, max_steps=1,
        keep_rows=True,
    )  # fmt: skip
    trainer.train()
    kept = hf_distill.written_rows(tmp_path)
    assert len(kept) == 1  # equal prompts have equal texts in a step
    assert kept[0]["prompt"] == "the quick"
    completion = [token for token in kept[0]["labels"] if token != -100]
    assert kept[0]["text"] == tiny_tokenizer.decode(completion, skip_special_tokens=True)


def test_kept_rows_recorded_give_the_same_step(tmp_path: Path) -> None:
    """On-policy text as data, with a recorded teacher: loss and gradient of the step it is from."""
    teacher = small_model(1, layers=2)
    _, log, gradient = one_step(
        tmp_path / "a", on_policy=1.0, teacher=teacher, alpha=0.9, keep_rows=True
    )
    kept = hf_distill.written_rows(tmp_path / "a")
    assert len(kept) == 8
    recorded = record(kept, teacher, tmp_path / "r", kind="full", data_collator=COLLATE)
    _, again, other = one_step(
        tmp_path / "b", rows=recorded, teacher=None, alpha=0.9, data_collator=COLLATE
    )
    assert again["loss"] == pytest.approx(log["loss"], rel=1e-4)
    assert again["ce"] == log["ce"] == 0
    for name, value in gradient.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)


def test_an_encoder_decoders_rows_can_be_trained_on(tmp_path: Path) -> None:
    from tasks_path import make_model

    options = {
        "model": make_model("T5", "seq2seq-lm", 0), "teacher": make_model("T5", "seq2seq-lm", 1),
        "data_collator": task_collate,
    }  # fmt: skip
    make(tmp_path, rows=task_rows("seq2seq-lm"), on_policy=1.0, max_steps=1, keep_rows=True,
         per_device_train_batch_size=8, **options).train()  # fmt: skip
    kept = hf_distill.written_rows(tmp_path)
    sources = {tuple(row["input_ids"]) for row in task_rows("seq2seq-lm")}
    assert {tuple(row["input_ids"]) for row in kept} == sources
    assert all(-100 not in row["labels"] for row in kept)


# ---- Interruptions ----


class Killed(Exception):
    pass


class Kill(TrainerCallback):
    """Ends a training after its fourth step has written and been trained on."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 4:
            raise Killed


@pytest.mark.parametrize("options", [{}, {"replay": 0.5}], ids=["kept", "replayed"])
def test_kill_and_resume_end_alike(options: dict[str, Any], tmp_path: Path) -> None:
    options = {
        "on_policy": 0.7, "max_steps": 6, "keep_rows": True, "save_strategy": "steps",
        "save_steps": 2, "on_policy_warmup": 0.3, **options,
    }  # fmt: skip
    whole = make(tmp_path / "whole", **options)
    whole.train()
    killed = make(tmp_path / "parts", **options | {"save_steps": 3})
    killed.add_callback(Kill())
    with pytest.raises(Killed):
        killed.train()
    path = tmp_path / "parts" / "written_rows.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "prom')  # killed while it wrote
    resumed = make(tmp_path / "parts", **options | {"save_steps": 3})
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert len(resumed.seen) == 3
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name])
    same = path.read_text() == (tmp_path / "whole" / "written_rows.jsonl").read_text()
    assert same  # of the texts themselves, a failure would print a long comparison
    # A training from the beginning forgets the rows of the one before.
    make(tmp_path / "whole", **options | {"max_steps": 1, "on_policy_warmup": 0}).train()
    assert set(hf_distill.written_rows(tmp_path / "whole")["step"]) == {1}


# ---- DistiLLM: replay, and a share that follows the validation loss ----


def test_replayed_rows_are_those_of_earlier_steps(tmp_path: Path) -> None:
    trainer = make(
        tmp_path, rows=make_rows(40, 0), on_policy=1.0, max_steps=10, replay=0.6, keep_rows=True
    )
    trainer.train()
    fresh: dict[tuple[Any, ...], int] = {}
    for row in hf_distill.written_rows(tmp_path):
        fresh.setdefault(tuple(row["input_ids"]), row["step"])
    repeated = 0
    for step, batch in enumerate(trainer.seen, start=1):
        for row in written_rows([batch]):
            assert row["ce_weight"] == 0
            written = fresh[tuple(row["input_ids"])]
            assert written <= step
            repeated += written < step
    assert 12 <= repeated <= 34  # of 36 rows after the first step, 0.6 or so


def test_the_share_follows_the_validation_loss(tmp_path: Path) -> None:
    args = arguments(tmp_path, on_policy=0.1, on_policy_raise=0.4)
    losses, shares = [3.0, 2.0, 2.5, 2.5, 2.6, 2.7], []
    log: list[dict[str, float]] = []
    for loss in losses:
        log += [{"loss": 1.0}, {"eval_loss": loss}]
        shares.append(share_now(args, SimpleNamespace(global_step=1, max_steps=9, log_history=log)))
    assert shares == pytest.approx([0.1, 0.1, 0.5, 0.5, 0.9, 1.0])


def test_of_several_sets_the_mean_loss_counts(tmp_path: Path) -> None:
    args = arguments(tmp_path, on_policy=0.1, on_policy_raise=0.4)
    pairs = [(3.0, 5.0), (2.0, 5.5), (2.2, 5.5), (2.0, 5.7), (4.0, 4.0)]
    shares, log = [], []
    for step, (novels, wiki) in enumerate(pairs):
        log += [
            {"loss": 1.0, "step": step},
            {"eval_novels_loss": novels, "eval_novels_own_loss": 9.0 * step, "step": step},
            {"eval_wiki_loss": wiki, "step": step},
        ]
        shares.append(share_now(args, SimpleNamespace(global_step=1, max_steps=9, log_history=log)))
    assert shares == pytest.approx([0.1, 0.1, 0.5, 0.5, 0.9])
    log += [{"eval_loss": 99.0, "step": 5}]  # of another set, which the user has evaluated
    now = share_now(args, SimpleNamespace(global_step=1, max_steps=9, log_history=log))
    assert now == pytest.approx(0.9)


@pytest.mark.parametrize("names", [(), ("one", "two")])
def test_a_training_raises_its_share(names: tuple[str, ...], tmp_path: Path) -> None:
    """A rate that is too high makes the validation loss rise."""
    sets = {name: make_rows(4, seed) for seed, name in enumerate(names, start=1)}
    trainer = make(
        tmp_path, on_policy=0.0, on_policy_raise=0.5, max_steps=4, optim="sgd", learning_rate=30.0,
        eval_strategy="steps", eval_steps=1, eval_dataset=sets or make_rows(4, 1),
        max_grad_norm=0.0,
    )  # fmt: skip
    trainer.train()
    key = "eval_one_loss" if names else "eval_loss"
    losses = [entry[key] for entry in trainer.state.log_history if key in entry]
    assert losses[1] > losses[0]
    written = [int((batch["ce_weight"] == 0).sum()) for batch in trainer.seen]
    assert written[:2] == [0, 0]
    assert sum(written[2:]) > 0
    with pytest.raises(InputError, match="eval_strategy is 'no'"):
        make(tmp_path, on_policy_raise=0.5).train()
