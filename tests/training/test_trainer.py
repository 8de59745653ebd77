"""What a user of the trainer relies on, beyond the objective that the grid pins."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import launch
from torch import Tensor
from trainer_setup import VOCABULARY, arguments, collate, make_rows, small_model, weights
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_distill import DistillationArguments, DistillationTrainer, InputError
from hf_distill.losses.objective import Term
from hf_distill.training.on_policy import OnPolicyArguments

TRAIN, EVAL = make_rows(24, seed=1), make_rows(13, seed=2)


def make_trainer(folder: Path, **changes: Any) -> DistillationTrainer:
    named = {field.name for field in fields(DistillationArguments)}
    options = {name: changes.pop(name) for name in list(changes) if name in named}
    defaults: dict[str, Any] = {
        "model": small_model(0) if "model_init" not in changes else None,
        "teacher": small_model(1, layers=2),
        "train_dataset": TRAIN,
        "eval_dataset": EVAL,
        "data_collator": collate,
    }
    kind = changes.pop("kind", DistillationTrainer)
    return kind(args=arguments(folder, **options), **(defaults | changes))


def test_alpha_0_is_plain_trainer_for_llama(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, model=small_model(0, "llama"), teacher=None, alpha=0.0, max_steps=5
    )
    trainer.train()
    plain = arguments(tmp_path, TrainingArguments, max_steps=5)
    other = Trainer(small_model(0, "llama"), plain, collate, train_dataset=TRAIN)
    other.train()
    torch.testing.assert_close(weights(trainer), weights(other), rtol=1e-5, atol=1e-6)


def test_gpt2_counts_predicted_positions_where_plain_trainer_counts_labels(tmp_path: Path) -> None:
    """transformers 5.23 counts each row's first label for GPT-2, which nothing predicts."""
    rows = [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}] * 4
    options = {"per_device_train_batch_size": 4, "max_steps": 1}
    trainer = make_trainer(tmp_path, teacher=None, alpha=0.0, train_dataset=rows, **options)
    trainer.train()
    model = small_model(0)
    ids = torch.tensor([[3, 4, 5, 6]])
    truth = -model(ids).logits[0, :3].double().log_softmax(-1)[range(3), ids[0, 1:]].mean()
    ours = trainer.state.log_history[0]["loss"]
    other = Trainer(
        small_model(0), arguments(tmp_path, TrainingArguments, **options), collate, rows
    )
    other.train()
    assert ours == pytest.approx(truth.item(), rel=1e-5)
    assert other.state.log_history[0]["loss"] == pytest.approx(truth.item() * 3 / 4, rel=1e-5)


def test_evaluation_does_not_depend_on_batch_size_or_processes(tmp_path: Path) -> None:
    found: dict[Any, dict[str, float]] = {}
    sets: dict[Any, dict[str, float]] = {}
    for size in (1, 4, 13):
        trainer = make_trainer(tmp_path, temperature=2.0, per_device_eval_batch_size=size)
        found[size] = _figures(trainer.evaluate())
        rows = make_rows(13, seed=2)
        sets[size] = _figures(trainer.evaluate({"many": rows, "few": rows[:2]}))
    launch("evaluate_worker.py", str(tmp_path / "two.json"))
    two = _figures(json.loads((tmp_path / "two.json").read_text()))
    sets["two processes"] = {name: two.pop(name) for name in sets[1]}
    found["two processes"] = two
    assert found[1].keys() == {
        "eval_loss",
        "eval_ce",
        "eval_forward_kl",
        "eval_teacher_ce",
        "eval_top1_agreement",
    }
    for figures in found.values():
        assert figures == pytest.approx(found[1], rel=1e-5)
    for figures in sets.values():
        assert figures == pytest.approx(sets[1], rel=1e-5)
        of_many = {name.replace("_many", ""): v for name, v in figures.items() if "_many" in name}
        assert of_many == pytest.approx(found[1], rel=1e-5)


def _figures(metrics: dict[str, float]) -> dict[str, float]:
    speed = ("runtime", "per_second", "preparation_time", "epoch")
    return {name: v for name, v in metrics.items() if not name.endswith(speed)}


def test_training_and_evaluation_report_on_one_scale(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        alpha=0.3,
        temperature=2.0,
        max_steps=1,
        eval_dataset=TRAIN,
        learning_rate=0.0,
        per_device_train_batch_size=len(TRAIN),
    )
    before = trainer.evaluate()
    trainer.train()
    logged = trainer.state.log_history[0]
    for name in ("loss", "ce", "forward_kl"):
        assert logged[name] == pytest.approx(before[f"eval_{name}"], rel=1e-5)
    expected = 0.7 * before["eval_ce"] + 0.3 * 4 * before["eval_forward_kl"]
    assert before["eval_loss"] == pytest.approx(expected, rel=1e-6)


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def test_resume_gives_the_weights_of_an_uninterrupted_run(tmp_path: Path) -> None:
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3}
    dropout = {"resid_pdrop": 0.2, "embd_pdrop": 0.2}  # so that random states matter
    whole = make_trainer(tmp_path / "a", model=small_model(0, **dropout), **options)
    whole.train()
    first = make_trainer(
        tmp_path / "b", model=small_model(0, **dropout), callbacks=[StopAt(5)], **options
    )
    first.train()
    broken = tmp_path / "b" / "checkpoint-5"  # as a kill in the middle of writing leaves it
    broken.mkdir(exist_ok=True)
    (broken / "trainer_state.json").write_text('{"global_step": ')
    second = make_trainer(tmp_path / "b", model=small_model(9, **dropout), **options)
    second.train(resume_from_checkpoint=True)
    torch.testing.assert_close(weights(second), weights(whole), rtol=0, atol=0)
    with pytest.raises(InputError, match="interrupted while"):
        second.train(resume_from_checkpoint=str(broken))


@pytest.mark.parametrize(
    "change",
    [
        {"alpha": 0.9},
        {"temperature": 3.0},
        {"divergence": "reverse_kl"},
        {"divergence": "jsd", "beta": 0.9},
        {"divergence": "skew_reverse_kl", "skew": 0.9},
        {"teacher_model_kwargs": {"dtype": "bfloat16"}},
        {"student_model_kwargs": {"dtype": "bfloat16"}},
    ],
    ids=str,
)
def test_every_option_changes_something(change: dict[str, Any], tmp_path: Path) -> None:
    small_model(0).save_pretrained(tmp_path / "student")
    small_model(1).save_pretrained(tmp_path / "teacher")
    pair = {"model": str(tmp_path / "student"), "teacher": str(tmp_path / "teacher")}
    base = {key: value for key, value in change.items() if key == "divergence" and len(change) > 1}
    losses = []
    for options in (base, change):
        trainer = make_trainer(tmp_path, max_steps=1, **pair, **options)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] != losses[1]


def test_no_option_is_left_out_above() -> None:
    added = {f.name for f in fields(DistillationArguments)} - {
        f.name for f in fields(TrainingArguments)
    }
    # These change how a result is made, not the result: tests/training/test_fused_head_training.py.
    added -= {"fused_head", "head_memory_mb"}
    added -= {"mixed_recordings"}  # changes what is refused: tests/recordings
    added -= {"teacher_placement"}  # where its weights are: tests/teachers/test_placement.py
    # How raw rows are tokenized: tests/training/test_trainer_rows.py.
    added -= {"max_length", "packing", "completion_only_loss", "assistant_only_loss"}
    # The same for other tasks: tests/tasks/test_raw_rows_of_tasks.py.
    added -= {"max_target_length", "source_prefix", "source_lang", "target_lang", "doc_stride"}
    added -= {"mlm_probability"}
    # What the student writes itself: tests/training/test_on_policy*.py.
    added -= OnPolicyArguments.names()
    added -= {"features"}  # tests/training/test_features.py
    marks = test_every_option_changes_something.pytestmark  # type: ignore[attr-defined]
    assert added == {name for change in marks[0].args[1] for name in change}


def test_teacher_is_frozen_in_eval_mode_and_never_saved(tmp_path: Path) -> None:
    teacher = small_model(1, layers=2, resid_pdrop=0.5)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer = make_trainer(tmp_path, teacher=teacher, max_steps=2)
    teacher.train()  # what a wrapper around both models does at every step
    trainer.train()
    assert not any(module.training for module in teacher.modules())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    torch.testing.assert_close(dict(teacher.state_dict()), before, rtol=0, atol=0)
    trainer.save_model(str(tmp_path / "saved"))
    saved = type(trainer.model).from_pretrained(tmp_path / "saved")
    assert saved.num_parameters() == small_model(0).num_parameters()


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_non_finite_loss_stops_with_step_and_cause(who: str, tmp_path: Path) -> None:
    models = {"student": small_model(0), "teacher": small_model(1, layers=2)}

    class Break(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                with torch.no_grad():
                    models[who].transformer.wte.weight.fill_(float("nan"))

    trainer = make_trainer(
        tmp_path,
        model=models["student"],
        teacher=models["teacher"],
        callbacks=[Break()],
        max_steps=5,
        save_strategy="steps",
        save_steps=2,
    )
    cause = "the teacher's logits" if who == "teacher" else "weights have diverged"
    with pytest.raises(InputError, match=f"not finite at step 3.*{cause}.*checkpoint-2"):
        trainer.train()


class WithPenalty(DistillationTrainer):
    """A term of a subclass: the mean square of the student's logits, per row."""

    def extra_terms(self, inputs: Any, outputs: Any) -> dict[str, Term]:
        return {"penalty": Term(outputs.logits.square().mean((1, 2)), "rows", weight=0.5)}


def test_extra_term_is_weighted_logged_and_evaluated(tmp_path: Path) -> None:
    options = {"max_steps": 1, "learning_rate": 0.0, "eval_dataset": TRAIN}
    whole = {"per_device_train_batch_size": 24}
    split = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 4}
    rows = {"train_dataset": TRAIN, "data_collator": lambda rows: collate(rows, length=12)}
    plain = make_trainer(tmp_path, **options, **whole, **rows)
    plain.train()
    for batches in (whole, split):
        trainer = make_trainer(tmp_path, kind=WithPenalty, **options, **batches, **rows)
        metrics = trainer.evaluate()
        trainer.train()
        logged = trainer.state.log_history[0]
        difference = logged["loss"] - plain.state.log_history[0]["loss"]
        assert difference == pytest.approx(0.5 * logged["penalty"], rel=1e-4)
        assert metrics["eval_penalty"] == pytest.approx(logged["penalty"], rel=1e-5)
        assert metrics["eval_loss"] == pytest.approx(logged["loss"], rel=1e-5)


def test_compute_metrics_still_gets_logits_and_labels(tmp_path: Path) -> None:
    seen = {}

    def metrics(prediction: Any) -> dict[str, float]:
        seen["logits"], seen["labels"] = prediction.predictions.shape, prediction.label_ids.shape
        return {"rows": float(len(prediction.predictions))}

    found = make_trainer(tmp_path, compute_metrics=metrics).evaluate()
    assert seen["logits"] == (*seen["labels"], VOCABULARY)
    assert found["eval_rows"] == len(EVAL)
    assert "eval_forward_kl" in found


# peft 0.21 asks for a property that transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_student_learns_and_only_its_adapter_moves(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(small_model(0), lora)
    trainer = make_trainer(tmp_path, model=model, max_steps=6, learning_rate=0.05)
    before = trainer.evaluate()["eval_loss"]
    frozen = model.get_base_model().transformer.wte.weight.clone()
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    torch.testing.assert_close(model.get_base_model().transformer.wte.weight, frozen)
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_padded_student_never_generates_ids_without_token(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    student = small_model(0, vocab_size=310)
    teacher = small_model(1, vocab_size=300)
    trainer = make_trainer(
        tmp_path, model=student, teacher=teacher, processing_class=tiny_tokenizer
    )
    trainer.save_model(str(tmp_path / "saved"))
    saved = type(student).from_pretrained(tmp_path / "saved")
    assert saved.generation_config.suppress_tokens == list(range(len(tiny_tokenizer), 310))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": None}, "alpha is 0.5, but train_dataset has no recorded teacher"),
        ({"teacher": 3}, "teacher is a int"),
        ({"teacher": "no/such-teacher"}, "teacher 'no/such-teacher' cannot be loaded"),
        ({"teacher": "./no/such"}, "teacher './no/such' is a folder that does not exist"),
        ({"teacher_placement": "shard"}, "teacher_placement is 'shard', but must be one of auto"),
        ({"alpha": 1.5}, "alpha is 1.5, but must be between 0 and 1"),
        ({"temperature": 0.0}, "temperature is 0.0, but must be above 0"),
        ({"beta": 1.0}, "beta is 1.0"),
        ({"skew": 0.0}, "skew is 0.0"),
        ({"divergence": "kl"}, "divergence is 'kl', but must be one of forward_kl"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"compute_loss_func": print}, "compute_loss_func"),
        ({"args": "out"}, "args is a str"),
    ],
    ids=str,
)
def test_refused_at_construction(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        if "args" in changes:
            DistillationTrainer(small_model(0), small_model(1), **changes)
        else:
            make_trainer(tmp_path, **changes)


def test_data_parallel_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(DistillationArguments, "n_gpu", 2)
    with pytest.raises(InputError, match="sees 2 GPUs.*accelerate launch"):
        arguments(tmp_path)


def test_real_ids_that_the_teacher_lacks_are_refused_and_masked_ones_replaced(
    tmp_path: Path,
) -> None:
    student = small_model(0, vocab_size=VOCABULARY + 1)
    pad, real = VOCABULARY, 5

    def padded(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        batch = collate(rows)
        batch["input_ids"][batch["attention_mask"] == 0] = pad
        return batch

    figures = make_trainer(tmp_path, model=student, data_collator=padded).evaluate()
    same = make_trainer(tmp_path, model=student).evaluate()
    assert figures["eval_loss"] == pytest.approx(same["eval_loss"], rel=1e-6)
    bad = [{"input_ids": [real, pad, real], "labels": [real, pad, real]}]
    with pytest.raises(
        InputError, match=f"token id {pad}: probably the data were tokenized for another"
    ):
        make_trainer(tmp_path, model=student, eval_dataset=bad).evaluate()


def test_dataset_without_labels_or_targets_is_refused(tmp_path: Path) -> None:
    masked = [{"input_ids": [3, 4], "labels": [-100, -100]}]
    with pytest.raises(InputError, match="no target"):
        make_trainer(tmp_path, eval_dataset=masked).evaluate()
    unlabelled = make_trainer(
        tmp_path, data_collator=lambda rows: {"input_ids": torch.tensor([[3, 4]])}
    )
    with pytest.raises(InputError, match="no labels, only input_ids"):
        unlabelled.train()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([3] * 500, "500 tokens, but the student takes"),
        ([3, 10**6], "the student reads ids up to .* the token id 1000000"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path: Path, ids: list[int], message: str) -> None:
    rows = [{"input_ids": ids, "labels": [3] * len(ids)}]
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path, train_dataset=rows).train()
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path, eval_dataset=rows).evaluate()


def test_model_classes_are_untouched(tmp_path: Path) -> None:
    """Nothing is patched: what is trained is the model that was given."""
    model: PreTrainedModel = small_model(0)
    forward: Callable[..., Any] = type(model).forward
    trainer = make_trainer(tmp_path, model=model, max_steps=1)
    trainer.train()
    assert trainer.model is model
    assert type(model).forward is forward


def test_a_model_that_is_made_anew_keeps_the_fused_head(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`train` makes a second model of `model_init`; its head is the one to replace."""
    trainer = make_trainer(tmp_path, model_init=lambda: small_model(0), max_steps=2)
    trainer.train()
    assert trainer._loss.student.fused
    assert not [r for r in caplog.records if "all of its logits" in r.message]
