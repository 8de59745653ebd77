"""On-policy rows: the step that the student's own text makes, and what is written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import TESTS
from on_policy_setup import Watching, make, written_rows
from peft import LoraConfig, get_peft_model
from trainer_setup import arguments, collate, make_rows, small_model, weights

from hf_distill.errors import InputError
from hf_distill.training.on_policy import OnPolicy

sys.path.insert(0, str(TESTS / "tasks"))

from task_models import collate as task_collate
from task_models import make_model
from task_models import make_rows as task_rows


def test_without_a_share_nothing_changes(tmp_path: Path) -> None:
    plain, none = make(tmp_path), make(tmp_path, on_policy=0.0, sampling_temperature=2.0)
    plain.train()
    none.train()
    for name, value in weights(plain).items():
        assert torch.equal(value, weights(none)[name])


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_what_was_written_given_as_data_gives_the_same_step(share: float, tmp_path: Path) -> None:
    written = make(tmp_path, on_policy=share, max_steps=2)
    written.train()
    rows = written_rows(written.seen)
    own = [row for row in rows if row["ce_weight"] == 0]
    assert len(own) == 8 if share == 1.0 else 0 < len(own) < 8
    replayed = make(tmp_path, rows=rows, max_steps=2)
    replayed.train()
    for name, value in weights(written).items():
        torch.testing.assert_close(value, weights(replayed)[name], rtol=1e-6, atol=1e-7)


def test_the_text_is_drawn_from_the_distribution_that_is_trained(tmp_path: Path) -> None:
    """A checkpoint's generation config often restricts or changes it."""
    seen = []
    for settings in ({}, {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "top_p": 0.1}):
        model = small_model(0)
        model.generation_config.update(do_sample=True, **settings)
        trainer = make(tmp_path, model=model, on_policy=1.0, max_steps=1)
        trainer.train()
        seen.append(written_rows(trainer.seen))
    assert seen[0] == seen[1]


def test_prompts_and_completions(tmp_path: Path) -> None:
    trainer = make(tmp_path, on_policy=1.0, max_steps=2)
    trainer.train()
    for row, old in zip(written_rows(trainer.seen), make_rows(8, 0), strict=True):
        prompt = next(i for i, label in enumerate(row["labels"]) if label != -100)
        first = next(i for i, label in enumerate(old["labels"]) if label != -100)
        assert row["input_ids"][:prompt] == old["input_ids"][:prompt]
        assert prompt == (first if first > 1 else min(3, len(old["input_ids"]) - 1))
        completion = row["input_ids"][prompt:]
        assert row["labels"] == [-100] * prompt + completion
        assert 1 <= len(completion) <= 6
        # The end is a target once, and nothing stands after it.
        assert 0 not in completion[:-1]
        assert completion[-1] == 0 or len(completion) == 6


def test_neither_batch_size_nor_accumulation_matter(tmp_path: Path) -> None:
    found = []
    for size, accumulation in ((8, 1), (4, 2), (2, 4)):
        trainer = make(
            tmp_path, on_policy=0.6, max_steps=3, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation, optim="sgd", learning_rate=0.3,
        )  # fmt: skip
        trainer.train()
        found.append((sorted(map(str, written_rows(trainer.seen)[:8])), weights(trainer)))
    for rows, values in found[1:]:
        assert rows == found[0][0]
        for name, value in values.items():
            torch.testing.assert_close(value, found[0][1][name], rtol=1e-4, atol=1e-6)


def test_a_resumed_training_writes_the_same(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole = make(tmp_path / "whole", on_policy=1.0, max_steps=4, **saving)
    whole.train()
    make(tmp_path / "parts", on_policy=1.0, max_steps=2, **saving).train()
    resumed = make(tmp_path / "parts", on_policy=1.0, max_steps=4, **saving)
    resumed.train(resume_from_checkpoint=True)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name])


def test_the_students_state_is_as_before(tmp_path: Path) -> None:
    trainer = make(tmp_path, on_policy=1.0, activation_checkpointing=True, max_steps=1)
    trainer.train()
    model = trainer.model.train()
    model.transformer.drop.eval()
    batches = [collate(make_rows(4, 1))]
    state = torch.get_rng_state()
    assert trainer._writer.write(batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.transformer.drop.training


def test_greedy_text_is_that_of_generate(tmp_path: Path) -> None:
    trainer = make(tmp_path, on_policy=1.0, sampling_temperature=0.0, max_steps=1)
    student = small_model(0).eval()
    trainer.train()
    for row in written_rows(trainer.seen)[:4]:
        prompt = next(i for i, label in enumerate(row["labels"]) if label != -100)
        ids = torch.tensor([row["input_ids"][:prompt]])
        alone = student.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )[0]
        assert row["input_ids"] == alone.tolist()


def packed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    batch = collate(rows)
    positions = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    return {**batch, "position_ids": positions}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"alpha": 0.0}, "on_policy is 0.5, but must be 0 with alpha 0"),
        ({"data_collator": packed}, "set packing to False"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"on_policy": 1.5}, "on_policy is 1.5"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=reason):
        make(tmp_path, **({"on_policy": 0.5} | options)).train()


def test_settings_without_a_share_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, keep_rows=True, on_policy_warmup=0.5)
    assert "no rows and on_policy_warmup, keep_rows have no effect" in caplog.text
    caplog.clear()
    make(tmp_path, keep_rows=True, on_policy_raise=0.1, eval_strategy="steps", eval_dataset=[])
    assert "no effect" not in caplog.text


def test_prompts_alone_are_enough(tmp_path: Path) -> None:
    """Rows without any target have nothing to learn from but what the student writes."""
    rows = [row | {"labels": [-100] * len(row["input_ids"])} for row in make_rows(8, 0)]
    trainer = make(tmp_path, rows=rows, on_policy=1.0, max_steps=1)
    trainer.train()
    for row, old in zip(written_rows(trainer.seen), rows, strict=False):
        assert row["input_ids"][: len(old["input_ids"])] == old["input_ids"]
    assert isinstance(trainer._writer, OnPolicy)


@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_encoder_decoders_write_too(name: str, tmp_path: Path) -> None:
    rows = task_rows("seq2seq-lm")
    trainer = Watching(
        make_model(name, "seq2seq-lm", 0),
        make_model(name, "seq2seq-lm", 1),
        arguments(
            tmp_path, on_policy=1.0, max_steps=1, max_new_tokens=5, sampling_temperature=0.0,
            per_device_train_batch_size=8, train_sampling_strategy="sequential",
        ),
        train_dataset=rows,
        data_collator=task_collate,
    )  # fmt: skip
    student = make_model(name, "seq2seq-lm", 0)
    trainer.train()
    batch = trainer.seen[0]
    for number, row in enumerate(rows):
        ids = torch.tensor([row["input_ids"]])
        alone = student.generate(ids, max_new_tokens=5, do_sample=False, num_beams=1)[0, 1:]
        labels = batch["labels"][number]
        assert labels[labels != -100].tolist() == alone.tolist()
        assert batch["input_ids"][number][: ids.shape[1]].tolist() == row["input_ids"]
    assert batch["ce_weight"].tolist() == [0.0] * len(rows)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_writes_with_its_adapter(tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    torch.manual_seed(3)
    student = get_peft_model(small_model(0), lora)
    trainer = make(tmp_path, model=student, on_policy=1.0, max_steps=1, sampling_temperature=0.0)
    ids = torch.tensor([make_rows(8, 0)[2]["input_ids"][:2]])
    student.eval()
    alone = student.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
    )[0]
    trainer.train()
    rows = written_rows(trainer.seen)
    assert alone.tolist() in [row["input_ids"] for row in rows]
