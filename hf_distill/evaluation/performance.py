"""Measure what a model costs: parameters, size, speed, memory."""

from __future__ import annotations

import ctypes
import gc
import inspect
import resource
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterable
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
from hf_distill.models.from_scratch import max_positions
from hf_distill.models.vocabulary import embedding_rows

PROMPT_TOKENS, NEW_TOKENS = 128, 64
EXAMPLES = 8
REPEATS = 5
BUDGET_S = 30.0
"""After this many seconds a slow model is not timed again."""

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
def speed(
    model: Any,
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    repeats: int = REPEATS,
    budget_s: float = BUDGET_S,
) -> dict[str, float]:
    """Speed and memory of a model in eval mode on one prompt, on the device where it is.

    The prompt is random ids, since the text makes no difference. Both lengths are cut to the
    model's positions. Speeds are medians after a warm-up.
    returns: `prefill_tokens_per_s` (prompt tokens read, cache filled), `decode_tokens_per_s`
        (tokens after the first, greedy, with the cache), and `peak_memory_mb`, see there
    """
    started = time.perf_counter()
    limit = max_positions(model.config) or prompt_tokens + new_tokens
    new_tokens = max(2, min(new_tokens, limit // 2))
    prompt_tokens = max(1, min(prompt_tokens, limit - new_tokens))
    prompt = _random_prompt(model, prompt_tokens)
    _prefill(model, prompt)
    _generate(model, prompt, 2)
    prefills: list[float] = []
    decodes: list[float] = []
    while not decodes or (len(decodes) < repeats and time.perf_counter() - started < budget_s):
        prefills.append(_seconds(model, lambda: _prefill(model, prompt)))
        first = _seconds(model, lambda: _generate(model, prompt, 1))
        whole = _seconds(model, lambda: _generate(model, prompt, new_tokens))
        decodes.append(max(whole - first, 1e-9))
    return {
        "prefill_tokens_per_s": prompt_tokens / statistics.median(prefills),
        "decode_tokens_per_s": (new_tokens - 1) / statistics.median(decodes),
        "peak_memory_mb": peak_memory_mb(model, prompt_tokens + new_tokens),
    }


@torch.no_grad()
def peak_memory_mb(model: Any, tokens: int = PROMPT_TOKENS + NEW_TOKENS) -> float:
    """The peak memory of tensors during prefill and decoding, in MB (10^6 bytes).

    It is the model's own weights and buffers, plus the most that prefill and decoding hold on top
    of them (activations, cache, logits). Other models on the device do not count.

    On CUDA the allocator reports it. Elsewhere the results of all operations are counted while they
    exist, since the resident memory of a process includes leftovers of earlier work and changes
    from run to run. Nearly all tokens are prompt, since decoding adds only the cache to the peak.
    """
    few = min(4, tokens - 1)
    prompt = _random_prompt(model, tokens - few)
    return _peak_mb(model, lambda: _generate(model, prompt, few))


@torch.no_grad()
def forward_speed(
    model: Any,
    *,
    tokens: int = PROMPT_TOKENS,
    examples: int = EXAMPLES,
    repeats: int = REPEATS,
    budget_s: float = BUDGET_S,
) -> dict[str, float]:
    """Speed and memory of a model in eval mode that reads, and writes nothing.

    tokens: of each example, cut to the model's positions; examples: read together
    returns: `examples_per_s`, a median after a warm-up, and `peak_memory_mb` of one such forward,
        which is counted as in `peak_memory_mb`
    """
    started = time.perf_counter()
    # RoBERTa and its relatives reserve two positions.
    limit = max_positions(model.config) or tokens + 2
    ids = _random_prompt(model, max(1, min(tokens, limit - 2)), rows=examples)

    def read() -> None:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))

    read()
    times: list[float] = []
    while not times or (len(times) < repeats and time.perf_counter() - started < budget_s):
        times.append(_seconds(model, read))
    return {
        "examples_per_s": examples / statistics.median(times),
        "peak_memory_mb": _peak_mb(model, read),
    }


def _peak_mb(model: Any, work: Callable[[], None]) -> float:
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


def _random_prompt(model: Any, tokens: int, rows: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)  # the global random state stays as it is
    ids = torch.randint(embedding_rows(model), (rows, tokens), generator=generator)
    # Some classifiers refuse, or look for, padding.
    padding = model.config.get_text_config().pad_token_id
    ids = ids if rows == 1 or padding is None else ids.masked_fill(ids == padding, padding + 1)
    return ids.to(model.device)


def _prefill(model: Any, prompt: Tensor) -> None:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # As generation does it: only the last position's logits are wanted.
    last_only = "logits_to_keep" in inspect.signature(base.forward).parameters
    options: dict[str, Any] = {"logits_to_keep": 1} if last_only else {}
    if model.config.is_encoder_decoder:  # the encoder reads the prompt, the decoder begins
        options["decoder_input_ids"] = torch.zeros_like(prompt[:, :1])
    model(input_ids=prompt, use_cache=True, **options)


def _generate(model: Any, prompt: Tensor, new_tokens: int) -> None:
    model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        synced_gpus=False,  # the model is whole here, or all processes run it alike
        num_beams=1,
        use_cache=True,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=0,  # never needed in a batch of one; saves a warning
    )


def _seconds(model: Any, work: Callable[[], None]) -> float:
    _wait_for(model.device)
    start = time.perf_counter()
    work()
    _wait_for(model.device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    """Wait until an accelerator has finished its queued work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
