"""Position ids of left-padded rows, and how many positions a model has."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from hf_distill.models.from_scratch import max_positions


class PositionCounter:
    """Makes position ids for rows that are padded on the left, in the model's own way.

    Without position ids, a model with absolute positions counts the padding. Models that count from
    the padding index + 1 (RoBERTa and its relatives) get ids by that rule. Models with several
    position axes, and those whose forward takes no `position_ids`, compute their own.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.offset = _padding_index(model) or 0
        name = "_prepare_position_ids_for_generation"
        plain = getattr(GenerationMixin, name)
        one_axis = getattr(type(model), name, plain) is plain
        accepted = "position_ids" in inspect.signature(model.forward).parameters
        self.applies = accepted and one_axis and not _several_axes(model.config)

    def __call__(self, attention_mask: Tensor) -> Tensor:
        """attention_mask: (rows, positions); returns: the same shape, int64"""
        counted = attention_mask.long().cumsum(-1)
        if self.offset:
            return counted * attention_mask.long() + self.offset
        return (counted - 1).clamp(min=0)


def position_limit(model: PreTrainedModel) -> int | None:
    """The longest row that a model's table of positions allows; None where there is no table.

    Rotary and relative positions are computed, not looked up: longer rows than their config states
    are unusual but not an error.
    """
    stated = max_positions(model.config)
    if stated is None:
        return None
    tokens = model.get_input_embeddings()
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    tables += [buffer for buffer in model.buffers() if buffer.dim() == 2]
    # A ZeRO-3 weight is empty between uses; its whole shape is kept beside it.
    sizes = [getattr(table, "ds_shape", table.shape)[0] for table in tables]
    if not any(stated <= size <= stated + 4 for size in sizes):
        return None
    padding = _padding_index(model)
    return stated if padding is None or stated not in sizes else stated - padding - 1


def _padding_index(model: nn.Module) -> int | None:
    """The index that positions are counted from, in models that count from it."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position_embedding" in name:
            return module.padding_idx
    return None


def _several_axes(config: Any) -> bool:
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    return isinstance(rope, dict) and "mrope_section" in rope


def left_padded(attention_mask: Tensor) -> Tensor:
    """0-dim bool: whether any row has padding before its first token."""
    return (attention_mask[:, 0] == 0).any() if attention_mask.numel() else torch.zeros(()).bool()
