"""Ways of use that are rare, and must not train on something else than what was meant."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from trainer_setup import VOCABULARY, arguments, collate, make_rows, small_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_distill import DistillationTrainer, InputError
from hf_distill.models.positions import position_limit
from hf_distill.models.runner import ModelRunner
from hf_distill.tasks import CausalLM
from hf_distill.training.step_sums import StepSums

ROWS = make_rows(16, seed=3)


def make(tmp_path: Path, model: Any = None, teacher: Any = ..., **options: Any) -> Any:
    data = {
        k: options.pop(k) for k in ("train_dataset", "data_collator", "callbacks") if k in options
    }
    if teacher is ...:
        teacher = None if options.get("alpha") == 0 else small_model(1)
    return DistillationTrainer(
        small_model(0) if model is None else model,
        teacher,
        arguments(tmp_path, **options),
        **({"train_dataset": ROWS, "eval_dataset": ROWS, "data_collator": collate} | data),
    )


# ---- Arguments changed after construction ----


@pytest.mark.parametrize(
    "change", [{"alpha": 0.9}, {"temperature": 3.0}, {"divergence": "reverse_kl"}], ids=str
)
def test_changed_arguments_reach_training_and_evaluation(
    change: dict[str, Any], tmp_path: Path
) -> None:
    options = {"max_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": 16}
    trainer = make(tmp_path, **options)
    before = trainer.evaluate()["eval_loss"]
    for name, value in change.items():
        setattr(trainer.args, name, value)
    trainer.train()
    expected = make(tmp_path, **options, **change).evaluate()["eval_loss"]
    assert trainer.state.log_history[-2]["loss"] == pytest.approx(expected, rel=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert before != pytest.approx(expected, rel=1e-3)


def test_a_callback_may_change_them(tmp_path: Path) -> None:
    class Anneal(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            args.alpha = state.global_step / 2

    trainer = make(tmp_path, max_steps=3, callbacks=[Anneal()])
    trainer.train()
    for step, logged in enumerate(trainer.state.log_history[:3]):
        alpha = step / 2
        parts = (1 - alpha) * logged["ce"] + alpha * logged.get("forward_kl", 0.0)
        assert logged["loss"] == pytest.approx(parts, rel=1e-5)


def test_a_change_out_of_range_is_refused(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.args.alpha = 1.5
    with pytest.raises(InputError, match=r"alpha is 1\.5"):
        trainer.train()


# ---- What a model adds to its loss ----


def mixtral(seed: int = 0, coefficient: float = 10.0, **config: Any) -> Any:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY, num_hidden_layers=1, num_key_value_heads=1,
            num_local_experts=4, router_aux_loss_coef=coefficient,
            **({"output_router_logits": True} | shape | config),
        )
    )  # fmt: skip


@pytest.mark.parametrize("fused_head", [True, False])
def test_the_routers_loss_is_kept(fused_head: bool, tmp_path: Path) -> None:
    options = {"max_steps": 1, "per_device_train_batch_size": 16, "learning_rate": 1e-3}
    ours = make(tmp_path, mixtral(), alpha=0.0, fused_head=fused_head, **options)
    ours.train()
    theirs = Trainer(
        mixtral(),
        arguments(tmp_path, TrainingArguments, **options),
        train_dataset=ROWS,
        data_collator=collate,
    )
    theirs.train()
    logged = ours.state.log_history[0]
    assert logged["loss"] == pytest.approx(theirs.state.log_history[0]["loss"], rel=1e-4)
    assert logged["loss"] == pytest.approx(logged["ce"] + 10 * logged["router_aux_loss"], rel=1e-5)
    for name, value in theirs.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], value, rtol=1e-3, atol=1e-5)
    found = ours.evaluate()
    assert found["eval_loss"] == pytest.approx(
        found["eval_ce"] + 10 * found["eval_router_aux_loss"], rel=1e-5
    )


def test_no_router_no_term(tmp_path: Path) -> None:
    trainer = make(tmp_path, mixtral(output_router_logits=False), alpha=0.0, max_steps=1)
    trainer.train()
    assert "router_aux_loss" not in trainer.state.log_history[0]


class Penalised(LlamaForCausalLM):
    """Adds something to its loss that only it knows of."""

    def forward(self, input_ids: Any, labels: Any = None, **options: Any) -> Any:
        options.pop("num_items_in_batch", None)
        outputs = super().forward(input_ids, labels=labels, **options)
        if outputs.loss is not None:
            outputs.loss = outputs.loss + 0.3
        return outputs


def test_a_loss_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Penalised adds 0\.3 to its cross-entropy"):
        make(tmp_path, Penalised(small_model(0, "llama").config))


# ---- Positions and padding ----


def roberta(seed: int) -> Any:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = RobertaConfig(
        vocab_size=VOCABULARY, num_hidden_layers=1, max_position_embeddings=34, is_decoder=True,
        pad_token_id=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **shape,
    )  # fmt: skip
    return RobertaForCausalLM(config)


def left(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    batch = collate(rows)
    shifts = (batch["attention_mask"] == 0).sum(-1)
    return {
        name: torch.stack([v.roll(int(s)) for v, s in zip(values, shifts, strict=True)])
        for name, values in batch.items()
    }


@pytest.mark.parametrize("make_model", [roberta, small_model], ids=["roberta", "gpt2"])
@pytest.mark.parametrize("collator", [left, collate], ids=["left", "right"])
def test_padding_changes_nothing(make_model: Any, collator: Any, tmp_path: Path) -> None:
    pair = (make_model(0), make_model(1))
    alone = make(tmp_path, *pair, per_device_eval_batch_size=1).evaluate()
    padded = make(tmp_path, *pair, per_device_eval_batch_size=8, data_collator=collator).evaluate()
    for name in ("eval_loss", "eval_ce", "eval_forward_kl"):
        assert padded[name] == pytest.approx(alone[name], rel=1e-5)


def test_position_ids_are_made_for_left_padding_only() -> None:
    runner = ModelRunner(small_model(0), "student")
    assert "position_ids" not in runner.inputs(collate(ROWS[:4]))
    assert runner.inputs(left(ROWS[:4]))["position_ids"][0].min() == 0


def test_the_longest_row() -> None:
    assert position_limit(roberta(0)) == 32  # 34 less the padding index and one
    assert position_limit(small_model(0)) == 32
    assert position_limit(small_model(0, "llama", max_position_embeddings=8)) is None


class Maskless(GPT2LMHeadModel):
    """Attends to padding, as models without attention do."""

    def forward(
        self, input_ids: Any, attention_mask: Any = None, labels: Any = None, **options: Any
    ) -> Any:
        return super().forward(input_ids, labels=labels, **options)


def test_a_model_that_ignores_the_mask_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def warned(collator: Any, kind: Any) -> int:
        caplog.clear()
        model = kind(small_model(0).config)
        make(tmp_path, model, data_collator=collator, max_steps=2).train()
        return sum("ignores the attention mask" in r.message for r in caplog.records)

    assert warned(left, Maskless) == 1
    assert warned(collate, Maskless) == 0
    assert warned(left, GPT2LMHeadModel) == 0


# ---- Models that no task fits ----


def test_models_that_no_task_fits_are_refused(tmp_path: Path) -> None:
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    )
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = BertConfig(vocab_size=40, num_hidden_layers=1, **shape)
    choice = BertForMultipleChoice(config)
    with pytest.raises(InputError, match="the student is a BertForMultipleChoice.*no task"):
        make(tmp_path, choice)
    bert = BertForMaskedLM(config)
    for model, reason in ((t5, "encoder-decoder"), (bert, "does not predict the next token")):
        with pytest.raises(InputError, match=f"the teacher is a {type(model).__name__}.*{reason}"):
            make(tmp_path, teacher=model)


def test_a_decoder_that_looks_ahead_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = roberta(0)
    assert CausalLM().refusal(model) is None
    assert not caplog.records
    model.config.is_decoder = False
    assert CausalLM().refusal(model) is None
    assert "is_decoder=False" in caplog.text


def test_a_frozen_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the student has no trainable parameter"):
        make(tmp_path, small_model(0).requires_grad_(False))


class WideBias(LlamaForCausalLM):
    """Touches its logits after the head with something as wide as the vocabulary."""

    def forward(
        self, input_ids: Any, attention_mask: Any, labels: Any = None, **options: Any
    ) -> Any:
        outputs = super().forward(input_ids, attention_mask, labels=labels, **options)
        outputs.logits = outputs.logits + torch.linspace(-1, 1, VOCABULARY)
        return outputs


@pytest.mark.parametrize("role", ["model", "teacher"])
def test_wide_changes_after_the_head_fall_back(
    role: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def wide() -> Any:
        torch.manual_seed(5)
        return WideBias(small_model(0, "llama").config)

    found = make(tmp_path, **{role: wide()}).evaluate()
    assert "needs whole logits after the head" in caplog.text
    expected = make(tmp_path, fused_head=False, **{role: wide()}).evaluate()
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)


# ---- Trainer's own ways ----


def test_prediction_step_by_itself(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    loss, logits, labels = trainer.prediction_step(trainer.model, collate(ROWS[:4]), False)
    assert loss.isfinite()
    assert logits.shape[-1] == VOCABULARY
    assert labels.shape == logits.shape[:2]


@pytest.mark.parametrize(("ignored", "outputs"), [(None, 1), (["router_logits", "aux_loss"], 1)])
def test_ignored_outputs(ignored: Any, outputs: int, tmp_path: Path) -> None:
    trainer = make(tmp_path, mixtral(), alpha=0.0)
    _, logits, _ = trainer.prediction_step(trainer.model, collate(ROWS[:4]), False, ignored)
    theirs = Trainer(mixtral(), arguments(tmp_path, TrainingArguments))
    _, expected, _ = theirs.prediction_step(theirs.model, collate(ROWS[:4]), False, ignored)
    assert isinstance(logits, tuple) == isinstance(expected, tuple)
    _, everything, _ = trainer.prediction_step(trainer.model, collate(ROWS[:4]), False, [])
    assert isinstance(everything, tuple)


def test_the_log_starts_anew_with_a_smaller_batch(tmp_path: Path) -> None:
    """`auto_find_batch_size` runs out of memory, halves the batch and begins again."""

    class Small(DistillationTrainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            loss = super().training_step(model, inputs, *rest)
            if len(inputs["input_ids"]) > 4:
                raise RuntimeError("CUDA out of memory.")
            return loss

    trainer = Small(
        small_model(0),
        small_model(1),
        arguments(
            tmp_path, auto_find_batch_size=True, per_device_train_batch_size=16, max_steps=1,
            train_sampling_strategy="sequential",
        ),
        train_dataset=ROWS,
        data_collator=collate,
    )  # fmt: skip
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(
        0.5 * logged["ce"] + 0.5 * logged["forward_kl"], rel=1e-4
    )


def test_a_barrier_before_the_last_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for only_model in (True, False):
        trainer = make(tmp_path, save_strategy="steps", save_steps=1, max_steps=1,
                       save_only_model=only_model)  # fmt: skip
        waited = []
        state = tmp_path / "checkpoint-1" / "trainer_state.json"
        state.unlink(missing_ok=True)
        real = trainer.accelerator.wait_for_everyone

        def waiting(real: Any = real, waited: list[bool] = waited, state: Path = state) -> None:
            waited.append(state.exists())
            real()

        monkeypatch.setattr(trainer.accelerator, "wait_for_everyone", waiting)
        trainer.train()
        assert False in waited
        assert state.exists()


# ---- float16 ----


def test_a_step_that_only_fp16_spoils_is_skipped(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    scale = [2.0]
    scaler = SimpleNamespace(is_enabled=lambda: True, get_scale=lambda: scale[0])
    fp16 = SimpleNamespace(scaler=scaler, reduce=lambda tensor, _: tensor)
    sums = StepSums(arguments(tmp_path))
    good, bad = torch.tensor(1.0), torch.tensor(float("inf"))
    for value in (good, bad, good):
        sums.add({"ce": value}, value)
        sums.start_check(fp16, 1)  # type: ignore[arg-type]
        sums.finish_step(fp16)  # type: ignore[arg-type]
    assert "fp16 skips it" in caplog.text
    assert sums.pop_means(fp16) == {"ce": 1.0}  # type: ignore[arg-type]
    scale[0] = 0.5  # nothing is left to lower
    sums.add({"ce": bad}, bad)
    sums.start_check(fp16, 7)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the loss is not finite at step 7"):
        sums.finish_step(fp16)  # type: ignore[arg-type]


# ---- Trackers ----


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio", "wandb"])
def test_a_missing_tracker_names_the_extra(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_distill.training.arguments.find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf"{tracker} is not installed: .*hf-distill\[trackers\]"):
        arguments(tmp_path, report_to=tracker)
    assert arguments(tmp_path, report_to="none").report_to == []


# ---- Labels ----


def test_padding_in_labels_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"input_ids": row["input_ids"]} for row in ROWS]

    def cloned(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate([{**row, "labels": row["input_ids"]} for row in rows])
        return {**batch, "labels": batch["input_ids"].clone()}

    options = {"train_dataset": rows, "max_steps": 1, "per_device_train_batch_size": 16,
               "train_sampling_strategy": "sequential"}  # fmt: skip
    found = make(tmp_path, data_collator=cloned, **options)
    found.train()
    assert sum("labels include padding" in r.message for r in caplog.records) == 1
    right = make(tmp_path, data_collator=None, **options)
    right.train()
    loss = right.state.log_history[0]["loss"]
    assert found.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("masked", [True, False])
def test_masked_ends_are_told(
    masked: bool, tmp_path: Path, tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = type(tiny_tokenizer)(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )  # fmt: skip
    rows = [{"input_ids": [5, 6, 7, 8, 0]}, {"input_ids": [5, 6, 0]}]

    def collator(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate([{**row, "labels": row["input_ids"]} for row in rows])
        ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 0)
        labels = ids.masked_fill(ids == 0 if masked else batch["attention_mask"] == 0, -100)
        return {**batch, "input_ids": ids, "labels": labels}

    trainer = DistillationTrainer(
        small_model(0, vocab_size=300),
        small_model(1, vocab_size=300),
        arguments(tmp_path, max_steps=2),
        train_dataset=Dataset.from_list(rows),
        data_collator=collator,
        processing_class=tokenizer,
        teacher_tokenizer=tokenizer,
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert sum("does not learn to stop" in r.message for r in caplog.records) == masked


def test_a_label_that_the_student_lacks(tmp_path: Path) -> None:
    rows = [{"input_ids": [3, 4, 5], "labels": [3, 4, 41]}]
    with pytest.raises(InputError, match="a label is the token id 41, but the student predicts"):
        make(tmp_path, train_dataset=rows).train()
