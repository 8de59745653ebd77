"""Sequence-to-sequence language modelling: the decoder predicts the tokens of the target text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_distill.losses.targets import IGNORE
from hf_distill.models.heads import has_head
from hf_distill.tasks.base import Task


@dataclass(frozen=True)
class Seq2SeqLM(Task):
    """Labels are the target text; position t of the decoder reads the tokens before t.

    shifted: the decoder's inputs for some labels, (rows, positions) both, by the model's own rule
    """

    key: ClassVar[str] = "seq2seq-lm"
    name: ClassVar[str] = "sequence-to-sequence language modelling"
    aligned: ClassVar[bool] = False
    label_names: ClassVar[tuple[str, ...]] = ("labels",)
    reads: ClassVar[tuple[str, ...]] = ("labels", "decoder_attention_mask")

    shifted: Callable[[Tensor], Tensor]

    @classmethod
    def refusal(cls, model: Any) -> str | None:
        """See `Task.refusal`."""
        if not getattr(model.config, "is_encoder_decoder", False):
            return "it is no encoder-decoder"
        if not has_head(model, cls.key) or model.get_output_embeddings() is None:
            return "it has no language-model head: load it with AutoModelForSeq2SeqLM"
        if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
            return "it has no rule for the inputs of its decoder"
        return None

    @classmethod
    def of(cls, model: Any) -> Seq2SeqLM:
        """See `Task.of`."""
        end = model.config.get_text_config().eos_token_id or 0

        def shifted(labels: Tensor) -> Tensor:
            # mBART looks for the last token of each row, and a row may have none.
            none = (labels == IGNORE).all(-1, keepdim=True)
            filled = torch.where(none, torch.full_like(labels, end), labels)
            return model.prepare_decoder_input_ids_from_labels(labels=filled)

        return cls(shifted)

    def labels(self, batch: Mapping[str, Any]) -> Tensor:
        """See `Task.labels`."""
        labels, mask = batch["labels"], batch.get("decoder_attention_mask")
        return labels if mask is None else labels.masked_fill(mask == 0, IGNORE)

    def model_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """See `Task.model_inputs`. Decoder inputs are made from the labels, if there are any."""
        inputs = super().model_inputs(batch)
        if inputs.get("decoder_input_ids") is None and batch.get("labels") is not None:
            inputs["decoder_input_ids"] = self.shifted(batch["labels"])
        return inputs
