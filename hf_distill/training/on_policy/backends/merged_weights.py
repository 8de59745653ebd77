"""The student's weights by the names of its checkpoint, with an adapter merged into them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hf_distill.models.base import base_model


@contextmanager
def merged_weights(model: Any) -> Iterator[list[tuple[str, Tensor]]]:
    """A context with the name and the whole weight of each parameter, tied ones once.

    Without an adapter these are the weights themselves, not copies. Afterwards the weights are
    exactly as before: merging and unmerging alone would leave a rounding error in them.

    model: the student, whole on this process
    """
    if not isinstance(model, PeftModel):
        yield [(name, parameter.detach()) for name, parameter in model.named_parameters()]
        return
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    bases: list[nn.Module] = [layer.get_base_layer() for layer in layers]
    kept = [(p, p.detach().clone()) for base in bases for p in base.parameters()]
    merged: Any = model
    merged.merge_adapter()
    try:
        yield _without_adapter(model)
    finally:
        merged.unmerge_adapter()
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)


def _without_adapter(model: PeftModel) -> list[tuple[str, Tensor]]:
    """The parameters of the base model by their names without an adapter."""
    found, active = [], model.active_adapters
    prefix: str = getattr(model.base_model, "prefix", "lora_")
    for name, parameter in base_model(model).named_parameters():
        if prefix in name or ".original_module." in name:
            continue
        for adapter in active:  # layers that are trained as a whole
            name = name.replace(f".modules_to_save.{adapter}.", ".")
        if ".modules_to_save." not in name:
            found.append((name.replace(".base_layer.", "."), parameter.detach()))
    return found
