"""What the GPU kit runs on: card, driver, versions, and the rates of a copy and of products."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from gpu_rows import run_cases
from gpu_timing import device, timed_on_device

PACKAGES = ["torch", "triton", "transformers", "accelerate", "peft", "datasets", "deepspeed"]
PACKAGES += ["trl", "liger-kernel", "numpy"]


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def copy_gb_s(megabytes: int) -> float:
    """Bytes read and written in a second by a copy of this size, in GB."""
    source = torch.randn(megabytes * 2**20 // 4, device=device())
    target = torch.empty_like(source)
    found = timed_on_device(lambda: target.copy_(source), budget_s=0.2)
    return round(2 * source.nbytes / found["seconds"] / 1e9, 1)


def product_tflop_s(dtype: torch.dtype, size: int) -> float:
    a, b = (torch.randn(size, size, device=device()).to(dtype) for _ in range(2))
    found = timed_on_device(lambda: a @ b, budget_s=0.3)
    return round(2 * size**3 / found["seconds"] / 1e12, 3)


def machine(_: Mapping[str, Any]) -> dict[str, Any]:
    cuda = device().type == "cuda"
    card = torch.cuda.get_device_properties(0) if cuda else None
    return {
        "card": None if card is None else card.name,
        "memory_mb": None if card is None else card.total_memory // 2**20,
        "driver": driver(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "copy_gb_s": copy_gb_s(1024 if cuda else 1),
        "bfloat16_tflop_s": product_tflop_s(torch.bfloat16, 8192 if cuda else 64),
        "float32_tflop_s": product_tflop_s(torch.float32, 8192 if cuda else 64),
        **{name: installed(name) for name in PACKAGES},
    }


if __name__ == "__main__":
    run_cases([{}], machine)
