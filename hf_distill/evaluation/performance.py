"""Measure a model's cost: parameters, size, speed, memory."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from hf_distill.errors import InputError
from hf_distill.evaluation.speed import (
    BUDGET_S,
    NEW_TOKENS,
    PROMPT_TOKENS,
    ROUNDS,
    generate,
    in_turn,
    random_prompt,
    reading,
    writing,
)

MB = 1e6
CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def size(model: Any) -> dict[str, float]:
    """`parameters`, tied ones counted once, and `size_mb`, see there."""
    return {"parameters": model.num_parameters(), "size_mb": size_mb(model)}


def size_mb(source: Any) -> float:
    """Size of the weights in MB (10^6 bytes).

    source: a model (what its state dict holds, in its own dtype and tied weights once, which is
        what `save_pretrained` writes), or the folder of a saved one (its safetensors files)
    raises: InputError for a folder without safetensors
    """
    if not isinstance(source, str | Path):
        return _bytes(source.state_dict().values()) / MB
    files = list(Path(source).glob("*.safetensors"))
    if not files:
        raise InputError(
            f"{str(source)!r} has no safetensors file, so its size is not known: "
            "give the folder where a model was saved"
        )
    return sum(file.stat().st_size for file in files) / MB


@torch.no_grad()
def costs(
    models: Mapping[str, Any],
    *,
    writes: bool,
    rounds: int = ROUNDS,
    budget_s: float = BUDGET_S,
) -> dict[str, dict[str, float]]:
    """Speed and memory of models in eval mode, by name, on the devices where they are.

    writes: False for models that read only
    returns: for each the medians of its speeds over rounds in which all models have their turn:
        `prefill_tokens_per_s` and `decode_tokens_per_s`, or `examples_per_s`; each with its
        `*_spread`, see `in_turn`; and `peak_memory_mb`, see there
    """
    works: dict[str, Callable[[], dict[str, float]]] = {}
    memory: dict[str, Callable[[], float]] = {}
    for name, model in models.items():
        if writes:
            works[name], tokens = writing(model)
            memory[name] = partial(peak_memory_mb, model, tokens)
        else:
            works[name], forward = reading(model)
            memory[name] = partial(_peak_mb, model, forward)
    found = in_turn(works, rounds, budget_s)
    return {name: found[name] | {"peak_memory_mb": memory[name]()} for name in models}


@torch.no_grad()
def peak_memory_mb(model: Any, tokens: int = PROMPT_TOKENS + NEW_TOKENS) -> float:
    """The peak memory of tensors during prefill and decoding, in MB (10^6 bytes).

    The peak is the model's weights and buffers, plus the most that prefill and decoding allocate
    (activations, cache, logits). Other models on the device do not count.

    On CUDA the allocator reports it. Elsewhere the results of all operations are counted while they
    exist. The resident memory of the process is not used: it includes earlier work and changes from
    run to run. Nearly all tokens are prompt tokens, since decoding adds only the cache to the peak.
    """
    few = min(4, tokens - 1)
    prompt = random_prompt(model, tokens - few)
    return _peak_mb(model, lambda: generate(model, prompt, few))


def _peak_mb(model: Any, work: Callable[[], Any]) -> float:
    """The model's own weights, and the most that some work holds beside them, in MB."""
    own = [*model.parameters(), *model.buffers()]
    devices = {tensor.device for tensor in own}
    if all(device.type == "cuda" for device in devices):
        before = {device: torch.cuda.memory_allocated(device) for device in devices}
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
        work()
        peak = sum(torch.cuda.max_memory_allocated(d) - held for d, held in before.items())
    else:
        with _HeldBytes(own) as held_bytes:
            work()
        peak = held_bytes.peak
    return (_bytes(own) + peak) / MB


class PeakMemory:
    """The peak memory of this process in bytes: that of its device's allocator, or on a CPU the
    resident memory (on Linux; elsewhere the peak since the process began)."""

    @staticmethod
    def available() -> int:
        """Bytes that are free now."""
        if torch.cuda.is_available():
            return torch.cuda.mem_get_info()[0]
        return psutil.virtual_memory().available

    @staticmethod
    def now() -> int:
        """Bytes that are held now."""
        if torch.cuda.is_available():
            return torch.cuda.memory_allocated()
        return psutil.Process().memory_info().rss

    @staticmethod
    def forget() -> None:
        """Reset the peak."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        elif CLEAR_REFS.exists():
            CLEAR_REFS.write_text("5")

    @staticmethod
    def peak() -> int:
        """The peak since the last reset."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        if not CLEAR_REFS.exists():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024


def give_back_memory() -> None:
    """Return cached free memory to the system, so that the next stage has its own peak.

    After the quickstart's rows are prepared this frees 190 of 930 MB, held by Arrow and glibc.
    """
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.memory.empty_cache()
    pyarrow.default_memory_pool().release_unused()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


class _HeldBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make while it is on, and their peak."""

    def __init__(self, own: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary()
        for tensor in own:  # a view of a weight is no new memory
            self._seen[tensor.untyped_storage()] = None

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, result)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen[storage] = None
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, nbytes: int) -> None:
        self.now -= nbytes


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors; shared memory counts once."""
    # Offloaded tensors have no address to tell them apart.
    distinct = {(t.device, t.data_ptr() or id(t), t.numel()): t for t in list(tensors)}
    return sum(t.numel() * t.element_size() for t in distinct.values())
