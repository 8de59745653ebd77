"""Time and memory of work on an accelerator; on a CPU the time only, for dry runs."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

MB = 2**20


def device() -> torch.device:
    """The card; the CPU in a dry run only, so that its times are never taken for a card's."""
    if os.environ.get("HF_DISTILL_GPU_DRY") == "1":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device: --dry runs on a CPU")
    return torch.device("cuda")


def free_memory() -> None:
    """Give back what earlier cases left, also after one that ran out of memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def timed_on_device(
    work: Callable[[], Any], *, budget_s: float = 1.0, least: int = 3, most: int = 30
) -> dict[str, Any]:
    """Median, least and most seconds of a call, by the device's own clock, and its memory.

    The first two calls are not timed: they compile, and give the memory. Then the work is repeated
    for about `budget_s`.
    returns: seconds, seconds_range, repeats; on CUDA extra_mb (peak of allocated memory minus what
        was allocated before) and allocated_mb (all allocations of one call together)
    """
    work()
    if device().type == "cpu":
        seconds = [_by_clock(work) for _ in range(least)]
        return _summary(seconds)
    torch.cuda.synchronize()
    free_memory()
    torch.cuda.reset_peak_memory_stats()
    before, allocated = torch.cuda.memory_allocated(), _allocated()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    once = time.perf_counter() - start
    memory = {
        "extra_mb": round((torch.cuda.max_memory_allocated() - before) / MB, 1),
        "allocated_mb": round((_allocated() - allocated) / MB, 1),
    }
    repeats = max(least, min(most, int(budget_s / max(once, 1e-6))))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    return _summary([a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]) | memory


def _by_clock(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _allocated() -> int:
    return int(torch.cuda.memory_stats()["allocated_bytes.all.allocated"])


def _summary(seconds: list[float]) -> dict[str, Any]:
    return {
        "seconds": round(statistics.median(seconds), 6),
        "seconds_range": [round(min(seconds), 6), round(max(seconds), 6)],
        "repeats": len(seconds),
    }
