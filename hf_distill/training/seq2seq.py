"""`Seq2SeqDistillationTrainer`: a `transformers.Seq2SeqTrainer` that distils."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from hf_distill.recordings.reader import without_recording
from hf_distill.training.arguments import DistillationArguments
from hf_distill.training.trainer import DistillationMixin


@dataclass
class Seq2SeqDistillationArguments(DistillationArguments, Seq2SeqTrainingArguments):
    """`transformers.Seq2SeqTrainingArguments` with the settings of a distillation."""


class Seq2SeqDistillationTrainer(DistillationMixin, Seq2SeqTrainer):
    """A `DistillationTrainer` for encoder-decoders that can also generate during evaluation.

    args: `Seq2SeqDistillationArguments`; with `predict_with_generate`, `compute_metrics` receives
        generated tokens, by greedy search or with `generation_num_beams`
    The other arguments are those of `DistillationTrainer`.
    """

    arguments = Seq2SeqDistillationArguments
    args: Seq2SeqDistillationArguments

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **generation: Any,
    ) -> tuple[Any, Any, Any]:
        """As Seq2SeqTrainer's, whose loss would be the cross-entropy instead of the objective."""
        step = super().prediction_step
        if prediction_loss_only or not self.args.predict_with_generate:
            return step(model, inputs, prediction_loss_only, ignore_keys)
        task, inputs = self._loss.task, self._prepare_inputs(inputs)
        loss = step(model, inputs, True, ignore_keys)[0] if task.has_labels(inputs) else None
        sources = self._sources(inputs)
        _, written, _ = Seq2SeqTrainer.prediction_step(
            self, model, sources, False, ignore_keys, **generation
        )
        labels = inputs.get("labels")
        assert written is not None
        if labels is not None and labels.shape[-1] < written.shape[-1]:
            labels = self._pad_tensors_to_max_len(labels, written.shape[-1])
        return loss, written, labels

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As Trainer's; the student's generation config stays as it was.

        `Seq2SeqTrainer.prediction_step` writes the defaults of `generate` into it (top_k 50,
        max_length 20, ...; transformers 5.23), which would then be saved with the student.
        """
        config: Any = getattr(self.model, "generation_config", None)
        if config is None:
            return super().evaluation_loop(*args, **kwargs)
        settings = vars(config)
        before = copy.deepcopy(settings)
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            settings.clear()
            settings.update(before)

    def _sources(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of `generate`, without labels and decoder inputs made from them."""
        labels, decoder = inputs.get("labels"), inputs.get("decoder_input_ids")
        made = decoder is None or (labels is not None and labels.shape == decoder.shape)
        left_out = ("decoder_input_ids", "decoder_attention_mask") if made else ()
        found = self._loss.task.model_inputs(without_recording(inputs))
        return {name: value for name, value in found.items() if name not in left_out}
