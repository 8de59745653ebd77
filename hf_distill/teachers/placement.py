"""Where a teacher's weights are stored: whole on every device, in shards, or on the CPU.

Sharding is torch's own `fully_shard`, whatever engine trains the student. Each layer is gathered
for its own forward and released again, so that the teacher is never whole on any device.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator, PartialState, cpu_offload, init_empty_weights
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hf_distill.errors import InputError
from hf_distill.models.engines import made_whole
from hf_distill.models.heads import auto_class
from hf_distill.models.loading import load_config, load_model

PLACEMENTS = ("auto", "replicated", "sharded", "offloaded")
# Up to this share of a device's memory a teacher is replicated: gathering costs time at every step.
SMALL = 0.25


def check_placement(placement: str) -> None:
    """InputError for an unknown placement."""
    if placement not in PLACEMENTS:
        raise InputError(
            f"teacher_placement is {placement!r}, but must be one of {', '.join(PLACEMENTS)}"
        )


def chosen(placement: str, size: int, processes: int, room: int) -> str:
    """What "auto" means for `size` bytes of weights on devices with `room` bytes each."""
    if placement == "sharded" and processes == 1:
        return "replicated"  # one shard is the whole
    if placement != "auto":
        return placement
    if processes > 1:
        return "replicated" if size <= SMALL * room else "sharded"
    return "replicated" if size <= 2 * SMALL * room or _on_cpu_only() else "offloaded"


def device_memory() -> int:
    """Bytes of this process's device; for a CPU, its share of the machine's memory."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    return psutil.virtual_memory().total // max(1, PartialState().num_processes)


def load_placed(
    name: str | Path, placement: str, task: str | None = None, **kwargs: Any
) -> tuple[PreTrainedModel, str]:
    """Load a teacher by id or path and decide its placement; returns both.

    A collective of all processes. A replicated teacher is read straight to the device of each
    process, never whole into the memory of the CPU before. A teacher that will be sharded is read
    by one process; the others get a model without weights, which `place` fills.
    raises: InputError if it cannot be loaded
    """
    state = PartialState()
    with made_whole():
        if kwargs.get("device_map") is not None:
            model = load_model(name, "teacher", task, **kwargs)
            if not hasattr(model, "hf_device_map"):  # set by transformers for several devices only
                vars(model)["hf_device_map"] = {"": model.device}
            return model, placement
        to_device = {**kwargs, "device_map": {"": state.device}}
        size = size_of(name, task, **kwargs)
        if size is None:
            return load_model(name, "teacher", task, **to_device), placement
        choice = chosen(placement, size, state.num_processes, device_memory())
        if choice == "sharded":
            return _read_once(name, task, **kwargs), choice
        model = load_model(
            name, "teacher", task, **(to_device if choice == "replicated" else kwargs)
        )
        return model, placement if state.num_processes == 1 else choice


def size_of(name: str | Path, task: str | None = None, **kwargs: Any) -> int | None:
    """The bytes of a model's weights, by its config; None if it is quantised."""
    config = load_config(name, "teacher", **kwargs)
    if kwargs.get("quantization_config") or getattr(config, "quantization_config", None):
        return None
    asked = kwargs.get("dtype", "auto")
    dtype = config.dtype if asked in ("auto", None) else asked
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    trusted = {key: kwargs[key] for key in ("trust_remote_code",) if key in kwargs}
    return weight_bytes(_without_weights(config, dtype or torch.float32, task, **trusted))


def _read_once(name: str | Path, task: str | None, **kwargs: Any) -> PreTrainedModel:
    """The model on the main process, and one without weights on the others."""
    state = PartialState()
    options: list[Any] = [None]
    model: PreTrainedModel | None = None
    if state.is_main_process:
        try:
            model = load_model(name, "teacher", task, **kwargs)
            options = [(model.config, model.dtype)]
        except InputError as error:
            options = [str(error)]
    options = broadcast_object_list(options)
    if isinstance(options[0], str):
        raise InputError(options[0])
    config, dtype = options[0]
    return model or _without_weights(config, dtype, task)


def place(model: PreTrainedModel, placement: str, accelerator: Accelerator) -> str:
    """Move a teacher's weights to their place; returns a description of it for the log.

    raises: InputError for a quantised teacher, or one with a device map, that would have to move
    """
    if placed_by_itself(model):
        if placement not in ("auto", "replicated"):
            raise InputError(
                f"teacher_placement is {placement!r}, but this teacher is quantised or has a "
                "device_map, and cannot be moved: leave teacher_placement at 'auto'"
            )
        _meet_inputs(model, accelerator.device)
        return f"as loaded, {_mb(weight_bytes(model))}"
    if _is_sharded(model):
        return "sharded"
    whole, processes = weight_bytes(model), accelerator.num_processes
    alone = " (one process: there is nothing to shard over)" if placement == "sharded" else ""
    placement = chosen(placement, whole, processes, device_memory())
    if placement == "sharded":
        _shard(model, accelerator)
        return f"sharded over {processes} devices, {_mb(weight_bytes(model))} on each"
    if placement == "offloaded":
        _offload(model, accelerator.device)
        return f"offloaded, {_mb(whole)} on the CPU"
    model.to(accelerator.device)
    return f"replicated, {_mb(whole)} on each of {processes} devices{alone}"


def _meet_inputs(model: PreTrainedModel, device: torch.device) -> None:
    """Put a model and its inputs on the same device.

    A quantised model is moved if its kind of quantisation allows it. A model with a device map
    stays, and a hook moves inputs to it and outputs back, as for a model on several devices.
    """
    if hasattr(model, "_hf_hook") or _same(model.device, device):
        return
    if not getattr(model, "hf_device_map", None) and not _has_hooks(model):
        try:
            model.to(device)  # type: ignore[arg-type]  # its decorator hides self
            return
        except (ValueError, RuntimeError, NotImplementedError):
            pass  # not every kind of quantisation can move
    add_hook_to_module(model, AlignDevicesHook(model.device, io_same_device=True))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights on this process, tied ones once."""
    return sum(
        p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes for p in model.parameters()
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:,.{0 if size >= 1e8 else 1}f} MB"


def _on_cpu_only() -> bool:
    return not torch.accelerator.is_available()


def placed_by_itself(model: nn.Module) -> bool:
    """Whether a model was quantised, or spread over devices by hooks, when it was loaded."""
    noted = getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False)
    return bool(noted) or _has_hooks(model)


def _has_hooks(model: nn.Module) -> bool:
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def _same(a: torch.device, b: torch.device) -> bool:
    """Whether two devices are one; without an index, a device is the current one of its type."""
    if a.type == b.type == "cpu":
        return True
    return torch.empty(0, device=a).device == torch.empty(0, device=b).device


def _is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _layers(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The modules that transformers marks as not to be split over devices."""
    names = set(model._no_split_modules or ())
    return (module for module in model.modules() if type(module).__name__ in names)


def _without_weights(
    config: Any, dtype: torch.dtype, task: str | None, **options: Any
) -> PreTrainedModel:
    with init_empty_weights(include_buffers=False):
        model = auto_class(config, task).from_config(config, dtype=dtype, **options)
    model.tie_weights()  # the empty parameters are not tied yet
    return model


def _shard(model: PreTrainedModel, accelerator: Accelerator) -> None:
    """Shard in place, layer by layer, from the main process's weights if others have none."""
    empty = torch.tensor(
        [any(p.is_meta for p in model.parameters())], device=accelerator.device, dtype=torch.int32
    )
    fill = bool(accelerator.reduce(empty, "max").item())
    weights: dict[str, Any] = {}
    if fill and accelerator.is_main_process:
        # This process's weights are distributed too: its model becomes as empty as the others'.
        weights = dict(model.state_dict())
        _empty(model)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in [*_layers(model), model]:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    if fill:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, weights, options=options)
        model.requires_grad_(False)


def _empty(model: nn.Module) -> None:
    """Replace a model's parameters by ones without memory; tied ones stay tied."""
    empty: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
                module._parameters[name] = empty.setdefault(id(parameter), made)


def _offload(model: PreTrainedModel, device: torch.device) -> None:
    """Keep layers on the CPU and move them to the device one at a time; the rest stays on it."""
    if device.type == "cpu":
        device = torch.device(
            "cpu"
        )  # accelerate's hooks take a CPU with an index for another device
    for layer in _layers(model):
        cpu_offload(layer, execution_device=device)
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            tensor.data = tensor.data.to(device)
