"""Speed, memory and size of one model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch

PROMPT_TOKENS, NEW_TOKENS, REPEATS = 64, 32, 3


def size(model: Any) -> dict[str, float]:
    """`parameters` (tied ones once) and `size_mb`, the bytes of a saved model / 1e6."""
    tensors = {p.data_ptr(): p for p in model.parameters()}.values()
    return {
        "parameters": sum(p.numel() for p in tensors),
        "size_mb": sum(p.numel() * p.element_size() for p in tensors) / 1e6,
    }


def _seconds(action: Callable[[], Any], device: torch.device) -> float:
    """Median time of an action after one warm-up."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


@torch.no_grad()
def speed(model: Any, *, batch_size: int = 1) -> dict[str, float]:
    """Prefill and decode speed in tokens per second, at a fixed prompt and greedy decoding.

    Decoding is timed as a whole generation less its prefill. `peak_memory_mb` is the highest
    allocation on an accelerator; on the CPU the model's weights and what generation added to the
    process's resident memory.
    """
    device = model.device
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or 10**9
    prompt_tokens = min(PROMPT_TOKENS, max(1, longest // 2))
    new_tokens = max(2, min(NEW_TOKENS, longest - prompt_tokens))
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, prompt_tokens)
    prompt = torch.randint(0, config.vocab_size, shape, generator=generator).to(device)
    process = psutil.Process()
    before = process.memory_info().rss
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    prefill = _seconds(lambda: model(input_ids=prompt, use_cache=True), device)

    def generate() -> Any:
        return model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            num_beams=1,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            use_cache=True,
        )

    decode = max(_seconds(generate, device) - prefill, 1e-9)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 1e6
    else:
        added = max(0, process.memory_info().rss - before)
        peak = size(model)["size_mb"] + added / 1e6
    return {
        "prefill_tokens_per_s": batch_size * prompt_tokens / prefill,
        "decode_tokens_per_s": batch_size * (new_tokens - 1) / decode,
        "peak_memory_mb": peak,
    }
