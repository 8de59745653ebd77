"""Whole trainer steps on the device against the same steps on a CPU in float32."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trainer_setup import arguments, make_rows, small_model, weights

from hf_distill import DistillationTrainer, record
from hf_distill.data import Collator

pytestmark = [
    pytest.mark.gpu,
    # peft 0.21 asks for a property that transformers 5.23 has renamed.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    # torch's compiler imports a module of torch that uses it.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning"),
]

VOCABULARY = 3000  # more than one block of the kernel, and no multiple of one
ROWS = Dataset.from_list(make_rows(32, seed=1))
COLLATE = Collator(1, 0)
TEACHERS = ("live", "full", "top_k", "sampled", "adapter")
# How far losses and weights may be from those of float32, relative to their largest value.
EXACT, ROUNDED = 1e-4, 2e-2
CASES: dict[str, tuple[float, dict[str, Any]]] = {
    "as it is": (EXACT, {}),
    "whole logits": (EXACT, {"fused_head": False}),
    "accumulation": (EXACT, {"gradient_accumulation_steps": 2}),
    "checkpointing": (
        EXACT,
        {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"use_reentrant": False},
        },
    ),
    # transformers turns TF32 on for it, whose products have 10 bits.
    "torch_compile": (EXACT, {"torch_compile": True, "tf32": False}),
    "bf16": (ROUNDED, {"bf16": True}),
}
# What every one of them does to the batches, so that the reference does the same.
BATCHES = ("gradient_accumulation_steps",)
# Losses of the steps, and weights by name.
Result = tuple[list[float], dict[str, Any]]


def with_adapter(model: Any) -> Any:
    torch.manual_seed(3)
    options = {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    return get_peft_model(model, LoraConfig(**options, init_lora_weights=False))


def recorded(folder: Path, kind: str) -> Dataset:
    options = {"k": 16, "draws": 20, "temperature": 1.0, "data_collator": COLLATE}
    teacher = small_model(1, layers=2, vocab_size=VOCABULARY)
    return record(ROWS, teacher, folder / f"recording-{kind}", kind=kind, **options)


def make_trainer(folder: Path, teacher: str, data: Dataset, **options: Any) -> DistillationTrainer:
    model = small_model(0, vocab_size=VOCABULARY)
    given = small_model(1, layers=2, vocab_size=VOCABULARY) if teacher == "live" else None
    if teacher == "adapter":
        model = given = with_adapter(model)
    sgd = {"optim": "sgd", "learning_rate": 0.2, "max_grad_norm": 0.0, "max_steps": 4}
    args = arguments(folder / "out", **(sgd | options))
    return DistillationTrainer(model, given, args, train_dataset=data, data_collator=COLLATE)


def train(folder: Path, *parts: Any, **options: Any) -> Result:
    """Loss of each step, and the trained weights on the CPU."""
    trainer = make_trainer(folder, *parts, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: value.float().cpu() for name, value in weights(trainer).items()}


def agree(found: Result, right: Result, error: float) -> None:
    assert found[0] == pytest.approx(right[0], rel=error)
    assert right[0][-1] != pytest.approx(right[0][0], rel=1e-2)  # something was learnt
    for name, value in right[1].items():
        value_of = found[1][name.removeprefix("_orig_mod.")]
        torch.testing.assert_close(
            value_of, value, rtol=error, atol=error * float(value.abs().max())
        )


def on(device: torch.device) -> dict[str, Any]:
    return {"use_cpu": device.type == "cpu"}


@pytest.fixture(scope="module")
def on_a_cpu(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    """on_a_cpu(...): losses and weights of a live teacher on a CPU in float32, made once."""

    @cache
    def made(**options: Any) -> Result:
        return train(tmp_path_factory.mktemp("cpu"), "live", ROWS, use_cpu=True, **options)

    return made


@pytest.mark.parametrize("teacher", TEACHERS[1:])
def test_teachers(teacher: str, tmp_path: Path, device: torch.device) -> None:
    data = ROWS if teacher == "adapter" else recorded(tmp_path, teacher)
    found = train(tmp_path, teacher, data, **on(device))
    agree(found, train(tmp_path, teacher, data, use_cpu=True), EXACT)


@pytest.mark.parametrize("case", CASES)
def test_options(
    case: str, tmp_path: Path, device: torch.device, on_a_cpu: Callable[..., Result]
) -> None:
    error, options = CASES[case]
    found = train(tmp_path, "live", ROWS, **on(device), **options)
    kept = {name: value for name, value in options.items() if name in BATCHES}
    agree(found, on_a_cpu(**kept), error)


def gradients(trainer: DistillationTrainer, loss_scale: float | None = None) -> dict[str, Any]:
    """Of the first micro-batch, by name, on the CPU; loss_scale: of fp16, instead of its own."""
    model = trainer.accelerator.prepare(trainer.model)
    if loss_scale is not None:
        trainer.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=loss_scale)
    batch = next(iter(trainer.get_train_dataloader()))
    counts = trainer._get_num_items_in_batch([batch], trainer.args.device)
    trainer.training_step(model, batch, counts)
    named = trainer.model.named_parameters()
    return {name: p.grad.float().cpu() / (loss_scale or 1.0) for name, p in named}


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_gradients_of_a_micro_batch(precision: str, tmp_path: Path, device: torch.device) -> None:
    if precision == "fp16" and device.type == "cpu":
        pytest.skip("accelerate has fp16 on accelerators only")
    options = {} if precision == "float32" else {precision: True}
    trainer = make_trainer(tmp_path, "live", ROWS, **on(device), **options)
    found = gradients(trainer, 256.0 if precision == "fp16" else None)
    right = gradients(make_trainer(tmp_path, "live", ROWS, use_cpu=True))
    assert found.keys() == right.keys()
    error = EXACT if precision == "float32" else ROUNDED
    for name, gradient in right.items():
        assert (found[name] - gradient).norm() <= error * gradient.norm() + 1e-6, name


def test_fp16_trains_with_the_loss_scaler(
    tmp_path: Path, device: torch.device, on_a_cpu: Callable[..., Result]
) -> None:
    """Steps that are infinite at the first scales are skipped; the others lower the loss."""
    if device.type == "cpu":
        pytest.skip("accelerate has fp16 on accelerators only")
    trainer = make_trainer(tmp_path, "live", ROWS, **on(device), fp16=True, max_steps=16)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(on_a_cpu()[0][0], rel=1e-2)
    assert losses[-1] < losses[0]
    assert trainer.accelerator.scaler.get_scale() >= 1.0


@pytest.mark.parametrize("teacher", ["live", "top_k"])
def test_resumed_training_ends_as_a_whole_one(
    teacher: str, tmp_path: Path, device: torch.device
) -> None:
    data = ROWS if teacher == "live" else recorded(tmp_path, teacher)
    saving = {"save_strategy": "steps", "save_steps": 2, **on(device)}
    _, whole = train(tmp_path, teacher, data, **saving)
    trainer = make_trainer(tmp_path, teacher, data, **saving)
    trainer.train(str(tmp_path / "out" / "checkpoint-2"))
    assert trainer.state.global_step == 4
    for name, value in weights(trainer).items():
        torch.testing.assert_close(value.float().cpu(), whole[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_no_synchronisation_inside_a_micro_batch(
    teacher: str, bf16: bool, tmp_path: Path, device: torch.device
) -> None:
    """Forward and backward of a micro-batch that is not the last of its step."""
    data = ROWS if teacher in ("live", "adapter") else recorded(tmp_path, teacher)
    options = {"gradient_accumulation_steps": 2, "bf16": bf16, **on(device)}
    trainer = make_trainer(tmp_path, teacher, data, **options)
    model = trainer.accelerator.prepare(trainer.model)
    batches = list(trainer.get_train_dataloader())[:3]
    counts = trainer._get_num_items_in_batch(batches, trainer.args.device)
    trainer.accelerator.gradient_state._set_sync_gradients(False)
    for number, batch in enumerate(batches):
        # The first one may look at the batch, or compile.
        with no_synchronisation(device) if number else nullcontext():
            loss = trainer.training_step(model, batch, counts)
        assert loss.isfinite()


class no_synchronisation:
    """Inside, every wait of the host for the device is an error."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def __enter__(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_: Any) -> None:
        if self.cuda:
            torch.cuda.set_sync_debug_mode("default")


def test_the_guard_against_synchronisation_works(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("a CPU has nothing to wait for")
    with pytest.raises(RuntimeError, match="synchroniz"), no_synchronisation(device):
        torch.ones(3, device=device).sum().item()
