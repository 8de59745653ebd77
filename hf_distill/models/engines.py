"""What accelerate's engines do to models and settings behind one's back, undone where it hurts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, parse_flag_from_env
from transformers.integrations import deepspeed as zero


def plain_accelerator(mixed_precision: str | None = None) -> Accelerator:
    """The processes of this launch, for work without an optimizer.

    Accumulation is said to be one step, because the launcher's own word for it may be "auto",
    which only a Trainer understands. Without being told, several processes on CPUs would not know
    of each other.
    """
    once = GradientAccumulationPlugin(num_steps=1)
    cpu = (
        not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and not torch.accelerator.is_available()
    )
    return Accelerator(cpu=cpu, mixed_precision=mixed_precision, gradient_accumulation_plugin=once)


@contextmanager
def one_accelerator(given: Accelerator | None) -> Iterator[Accelerator]:
    """The user's, or one for this work alone, that a Trainer after it knows nothing of."""
    if given is not None:
        yield given
        return
    fresh = not AcceleratorState._shared_state
    try:
        yield plain_accelerator()
    finally:
        if fresh:
            # A Trainer that wants mixed precision would be refused by a state without.
            AcceleratorState._reset_state()


@contextmanager
def made_whole() -> Iterator[None]:
    """Models that are made or loaded inside are whole on this process.

    Once DeepSpeed's ZeRO-3 is set up, transformers would cut every new model over the processes,
    so that one that is used by a single process, or by another engine, would be a shard of itself.
    """
    reference: Any = zero._hf_deepspeed_config_weak_ref
    kept = reference() if zero.is_deepspeed_zero3_enabled() else None
    if kept is not None:
        zero.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if kept is not None:
            zero.set_hf_deepspeed_config(kept)
