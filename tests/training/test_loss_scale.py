"""float16 with a real GradScaler, on a CPU, where accelerate would refuse it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_setup import arguments, collate, make_rows, small_model, weights
from transformers import TrainerCallback

from hf_distill import DistillationTrainer
from hf_distill.losses import fused_head as fused

STEPS = 8


class Watching(TrainerCallback):
    """The loss scale and a copy of one weight after each step."""

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self.scaler = scaler
        self.scales: list[float] = []
        self.moved: list[bool] = []
        self.last: torch.Tensor | None = None

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        self.last = model.get_output_embeddings().weight.detach().clone()

    def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        self.scales.append(self.scaler.get_scale())
        assert self.last is not None
        self.moved.append(not torch.equal(self.last, model.get_output_embeddings().weight))


def trained(folder: Path, scale: float, **options: Any) -> tuple[Any, Watching]:
    sgd = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "temperature": 2.0}
    trainer = DistillationTrainer(
        small_model(0, "llama"),
        small_model(1, "llama"),
        arguments(folder, max_steps=STEPS, **(sgd | options)),
        train_dataset=make_rows(64, 0),
        data_collator=collate,
    )
    accelerator = trainer.accelerator
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    seen = Watching(accelerator.scaler)
    trainer.add_callback(seen)
    try:
        trainer.train()
    finally:
        accelerator.state._mixed_precision = "no"  # other trainers share this state
    return trainer, seen


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e6])
def test_a_scale_that_is_too_large_falls_until_steps_are_taken(
    max_grad_norm: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    products = set()
    real = fused._Pass.run

    def watching(self: Any, hidden: torch.Tensor, *wanted: bool) -> Any:
        products.add(self.dtype)
        return real(self, hidden, *wanted)

    monkeypatch.setattr(fused._Pass, "run", watching)
    trainer, seen = trained(tmp_path, 2.0**24, max_grad_norm=max_grad_norm)
    assert products == {torch.float16}
    skipped = seen.moved.index(True)
    assert 0 < skipped < STEPS - 1
    assert seen.moved == [False] * skipped + [True] * (STEPS - skipped)
    assert seen.scales[skipped - 1] == seen.scales[-1] == 2.0 ** (24 - skipped)
    assert all(value.isfinite().all() for value in weights(trainer).values())


def test_the_scale_leaves_no_trace(tmp_path: Path) -> None:
    small, _ = trained(tmp_path / "a", 1.0)
    large, seen = trained(tmp_path / "b", 2.0**10)
    plain, _ = trained(tmp_path / "c", 2.0**10, fused_head=False)
    assert all(seen.moved)
    torch.testing.assert_close(weights(large), weights(small), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(weights(large), weights(plain), rtol=5e-3, atol=5e-3)
