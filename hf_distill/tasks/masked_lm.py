"""Masked language modelling: masked tokens are predicted at their own positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from hf_distill.losses.targets import IGNORE
from hf_distill.models.heads import has_head
from hf_distill.tasks.base import Task


class MaskedLM(Task):
    """Labels are at the positions of the masked tokens; padding is not a target."""

    key: ClassVar[str] = "masked-lm"
    name: ClassVar[str] = "masked language modelling"

    @classmethod
    def refusal(cls, model: Any) -> str | None:
        """See `Task.refusal`."""
        if getattr(model.config, "is_encoder_decoder", False):
            return "it is an encoder-decoder"
        if not has_head(model, cls.key):
            return "it has no head for masked tokens: load it with AutoModelForMaskedLM"
        return None

    def labels(self, batch: Mapping[str, Any]) -> Tensor:
        """See `Task.labels`."""
        return without_padding(batch["labels"], batch)


def without_padding(labels: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Labels of positions of `input_ids`, (rows, positions), `IGNORE` where there is padding."""
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return labels
    return labels.masked_fill(mask == 0, IGNORE)
