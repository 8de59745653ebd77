"""Work around side effects of accelerate's engines on models and settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DynamoBackend,
    GradientAccumulationPlugin,
    compile_regions,
    parse_flag_from_env,
    patch_environment,
)
from torch import nn
from transformers.integrations import deepspeed as zero


def plain_accelerator(mixed_precision: str | None = None) -> Accelerator:
    """An accelerator for work without an optimizer, over the processes of this launch.

    Gradient accumulation is set to one step, since the launcher may have set it to "auto", which
    only a Trainer understands. Without `cpu`, several processes on CPUs do not form a group.
    """
    once = GradientAccumulationPlugin(num_steps=1)
    cpu = (
        not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and not torch.accelerator.is_available()
    )
    return Accelerator(cpu=cpu, mixed_precision=mixed_precision, gradient_accumulation_plugin=once)


@contextmanager
def one_accelerator(given: Accelerator | None) -> Iterator[Accelerator]:
    """The user's accelerator, or a temporary one whose state is reset for a later Trainer."""
    if given is not None:
        yield given
        return
    fresh = not AcceleratorState._shared_state
    try:
        yield plain_accelerator()
    finally:
        if fresh:
            # A Trainer with mixed precision would be refused by a state without it.
            AcceleratorState._reset_state()


def compiles_in_one_graph(accelerator: Accelerator) -> bool:
    """Whether models are compiled with `fullgraph`, which fails at a replaced head."""
    plugin = accelerator.state.dynamo_plugin
    return plugin.backend != DynamoBackend.NO and plugin.fullgraph


def compiled(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Compile a frozen model by accelerate's dynamo settings; without these, return the model.

    The model is not changed, and shares its weights with the compiled one. `fullgraph` is left out,
    since the graph ends before a replaced output head.
    """
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend == DynamoBackend.NO:
        return model
    options = {**plugin.to_kwargs(), "fullgraph": False}
    if plugin.use_regional_compilation:
        return compile_regions(model, **options)
    whole: Any = torch.compile(model, **options)
    return whole


def keep_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes from packing the 4-bit weights of a trained model on a CPU.

    On a CPU with AVX512-BF16, the first forward without gradients in evaluation mode packs them
    permanently. No gradient passes through the packed product afterwards.
    """
    layers: Iterator[Any] = model.modules()
    for module in layers:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextmanager
def made_whole() -> Iterator[None]:
    """A context in which models are made or loaded whole on this process.

    Once DeepSpeed's ZeRO-3 is set up, transformers partitions every new model over the processes. A
    model for one process, or for another engine, would be incomplete. Under FSDP, transformers may
    leave weights to be sent by the first process, which happens for the trained model only.
    """
    reference: Any = zero._hf_deepspeed_config_weak_ref
    kept = reference() if zero.is_deepspeed_zero3_enabled() else None
    if kept is not None:
        zero.unset_hf_deepspeed_config()
    try:
        with patch_environment(fsdp_cpu_ram_efficient_loading="false"):
            yield
    finally:
        if kept is not None:
            zero.set_hf_deepspeed_config(kept)
