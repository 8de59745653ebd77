"""The transformers model inside an adapter or an engine's wrapper."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


def base_model(model: Any) -> PreTrainedModel:
    """The base model of a `peft` adapter; the model itself if there is no adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
