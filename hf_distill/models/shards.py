"""Gather weights that ZeRO-3 or FSDP2 keeps in shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

# The packages whose hooks gather the weights of a module before its forward.
ENGINES = ("deepspeed", "torch.distributed.fsdp")


def is_sharded(model: nn.Module) -> bool:
    """Whether ZeRO-3 or FSDP keeps a part of each weight on each process."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """A context in which a sharded model has all of its weights on this process.

    Entering is a collective of all processes. Inside, the model runs without its engine: each
    process may call as many forwards as it needs, also none, without gradients. Besides the shards
    this takes the memory of the whole weights. Does nothing for a model that is not sharded.

    model: the trained model, not the engine's wrapper; its weights must not be changed inside
    """
    with ExitStack() as stack:
        if is_sharded(model):
            stack.enter_context(_without_engine_hooks(model))
            stack.enter_context(gathered_zero3(model.parameters()))
            stack.enter_context(_gathered_fsdp2(model))
        yield


@contextmanager
def gathered_zero3(parameters: Iterable[Tensor]) -> Iterator[None]:
    """A context in which ZeRO-3's parameters are whole; whole ones are not touched.

    DeepSpeed is imported only where it is used.
    """
    sharded = [p for p in parameters if getattr(getattr(p, "ds_status", None), "value", 1) != 1]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


@contextmanager
def _gathered_fsdp2(model: nn.Module) -> Iterator[None]:
    """A context in which FSDP2's parameters are replaced by whole copies.

    FSDP2's `unshard` is not used: it needs streams that the first forward of the root module makes,
    and the student may generate before that.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward without a backward the root is still whole
    places: list[tuple[nn.Module, str, Any]] = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if isinstance(parameter, DTensor)
    ]
    whole: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    try:
        for module, name, parameter in places:
            if id(parameter) not in whole:
                whole[id(parameter)] = nn.Parameter(_full(parameter), requires_grad=False)
            module._parameters[name] = whole[id(parameter)]
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


def _full(parameter: DTensor) -> Tensor:
    """The whole values on the device of the mesh; offloaded shards are on the CPU."""
    local: Any = parameter.detach().to(parameter.device_mesh.device_type)
    full: Tensor = local.full_tensor()
    return full


@contextmanager
def _without_engine_hooks(model: nn.Module) -> Iterator[None]:
    """A context in which modules run without the hooks that gather and release their weights."""
    removed = []
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            theirs = {key for key, hook in hooks.items() if _of_engine(hook)}
            if theirs:
                removed.append((hooks, dict(hooks)))
                for key in theirs:
                    del hooks[key]
    try:
        yield
    finally:
        for hooks, before in removed:
            now = before | hooks  # in the order of before
            hooks.clear()
            hooks.update(now)


def _of_engine(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(ENGINES)
