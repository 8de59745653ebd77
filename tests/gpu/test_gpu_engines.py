"""DDP, FSDP2 and ZeRO on one device equal a CPU without an engine."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from distributed import launch
from engine_worker import make_trainer
from trainer_setup import weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


@pytest.mark.parametrize(
    ("engine", "teacher"),
    [
        ("ddp", "replicated"),
        ("fsdp2", "replicated"),
        ("fsdp2", "recorded"),
        ("zero2", "replicated"),
        ("zero3", "recorded"),
    ],
)
def test_an_engine_on_one_device(
    engine: str, teacher: str, tmp_path: Path, device: torch.device
) -> None:
    if engine != "ddp" and device.type == "cpu":
        # One case shows that the worker runs. accelerate leaves FSDP out on CPUs, and
        # DeepSpeed compiles for a minute.
        pytest.skip("on CPUs tests/training/test_distributed.py tests the engines")
    if engine.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    case = f"gpt2-full-{teacher}"
    launch("gpu_worker.py", str(tmp_path), engine, case, processes=1, timeout_s=55)
    found = torch.load(tmp_path / "weights.pt")
    trainer = make_trainer(tmp_path / "cpu", case, processes=1)
    trainer.train()
    for name, value in weights(trainer).items():
        if name in found:  # an engine may save a tied weight once
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)
    assert len(found) >= len(weights(trainer)) - 1
