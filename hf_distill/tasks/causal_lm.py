"""Causal language modelling: each position predicts the next token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers.models.auto import modeling_auto as auto

from hf_distill.errors import warn_once
from hf_distill.losses.targets import shifted_labels
from hf_distill.models.heads import HEADS, OTHER_HEADS
from hf_distill.tasks.base import Task

# Heads that predict something else than the next token.
OTHERS = OTHER_HEADS.union(*(names for key, (_, names) in HEADS.items() if key != "causal-lm"))


class CausalLM(Task):
    """Labels are the inputs shifted one to the left; a target and its predictor are attended."""

    key: ClassVar[str] = "causal-lm"
    name: ClassVar[str] = "causal language modelling"

    @classmethod
    def refusal(cls, model: Any) -> str | None:
        """See `Task.refusal`. Warns once if a decoder attends to the tokens that it predicts."""
        config, kind = model.config, type(model).__name__
        if getattr(config, "is_encoder_decoder", False):
            return "it is an encoder-decoder, whose labels are those of its decoder"
        if kind in OTHERS - HEADS[cls.key][1]:
            return "its head does not predict the next token"
        if model.get_output_embeddings() is None:
            return "it has no language-model head: load it with AutoModelForCausalLM"
        if getattr(config, "is_decoder", None) is False and _attends_both_ways(config):
            warn_once(
                "%s has is_decoder=False in its config, so every position attends to the tokens "
                "after it, including the predicted one: set is_decoder=True for a causal model.",
                kind,
            )
        return None

    def labels(self, batch: Mapping[str, Any]) -> Tensor:
        """See `Task.labels`."""
        return shifted_labels(batch)


def _attends_both_ways(config: Any) -> bool:
    """Whether the config is that of an encoder, which `is_decoder` alone makes causal."""
    return config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
