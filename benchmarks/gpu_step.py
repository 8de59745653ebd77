"""Whole optimizer steps on a GPU: live and recorded teachers, fine-tuning alone, TRL's GKD.

gpt2-medium teaches gpt2, 8 rows of 1024 tokens; a Qwen2 of 1.5B teaches one of 0.5B, 4 rows of 1024
tokens. Random weights, bf16 and a bfloat16 teacher, real trainers (those of `step.py`). `floor` is
the backbones, AdamW and the four products of the heads.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from common import Missing
from gpu_rows import run_cases
from gpu_timing import MB, device, free_memory
from step import Clock, floor, make_trainer
from transformers import TrainerCallback

VARIANTS = {"floor": "floor", "live": "ours", "recorded": "recorded"}
VARIANTS |= {"finetuning": "finetuning", "plain": "plain", "gkd": "gkd"}
GPT2 = {"teacher": "gpt2-medium", "student": "gpt2", "batch": 8, "length": 1024, "repeats": 8}
QWEN = {"teacher": "qwen2-1.5b", "student": "qwen2-0.5b", "batch": 4, "length": 1024, "repeats": 8}
TINY = {"teacher": "small-vocabulary", "student": "small-vocabulary"}
TINY |= {"batch": 2, "length": 32, "repeats": 1}
PAIRS = {"gpt2-medium to gpt2": GPT2, "qwen2-1.5b to qwen2-0.5b": QWEN}
DRY_PAIRS = {"tiny to tiny": TINY}


class DeviceClock(TrainerCallback):
    """Marks in the device's own time, so that no step waits for the host."""

    def __init__(self) -> None:
        self.marks: list[Any] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not self.marks:
            self.mark()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.mark()

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    @property
    def seconds(self) -> list[float]:
        """Of each step, with the loading of the batch before it except for the first."""
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(self.marks)]


def pairs() -> dict[str, dict[str, Any]]:
    return PAIRS if device().type == "cuda" else DRY_PAIRS


def cases() -> list[dict[str, str]]:
    return [{"pair": pair, "variant": variant} for pair in pairs() for variant in VARIANTS]


def run(case: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of a step and peak memory, after two steps that are not counted."""
    free_memory()
    cuda = device().type == "cuda"
    options = argparse.Namespace(**pairs()[case["pair"]], dtype="bfloat16", device=device().type)
    clock: Any = DeviceClock() if cuda else Clock()
    found: dict[str, Any] = {"tokens": options.batch * options.length}
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        # Near zero, unless an earlier case has left something.
        found["before_mb"] = round(torch.cuda.memory_allocated() / MB, 1)
    if case["variant"] == "floor":
        floor(options, None, clock)
    else:
        try:
            found |= train(VARIANTS[case["variant"]], options, clock)
        except Missing as missing:
            return {"error": f"not installed: {missing}"}
    seconds = clock.seconds[2:]
    found["seconds"] = round(statistics.median(seconds), 6)
    found["seconds_range"] = [round(min(seconds), 6), round(max(seconds), 6)]
    if cuda:
        found["peak_mb"] = round(torch.cuda.max_memory_allocated() / MB, 1)
    return found


def train(variant: str, options: argparse.Namespace, clock: Any) -> dict[str, Any]:
    steps = options.repeats + 2
    others: dict[str, Any] = {"logging_steps": steps}  # no log in between, which would wait
    if options.device == "cuda":
        others |= {"dataloader_pin_memory": True, "dataloader_num_workers": 2}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(variant, options, folder, **others)
        if options.device == "cuda":  # after the recording, whose peak is not that of the step
            torch.cuda.reset_peak_memory_stats()
        trainer.add_callback(clock)
        trainer.train()
    return {"loss": trainer.state.log_history[0]["loss"]}


if __name__ == "__main__":
    run_cases(cases(), run)
