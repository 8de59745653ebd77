"""A teacher in the same process: frozen, in eval mode, asked batch by batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.objective import Signal
from hf_distill.pretrained import local_tokenizer
from hf_distill.vocabulary import embedding_rows, head_rows, known_ids


class LiveTeacher:
    """A causal language model as a teacher.

    Its dtype, attention and quantisation are as it was loaded; nothing here changes them.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.name = model.config.name_or_path or type(model).__name__
        self.rows = head_rows(model)
        self.tokenizer = tokenizer or local_tokenizer(model.config.name_or_path)
        self._readable = embedding_rows(model)
        self._accepted = set(inspect.signature(model.forward).parameters)
        self._may_meet_unknown_ids = True
        self._autocast: Callable[[], AbstractContextManager[None]] = nullcontext

    def prepare(self, accelerator: Accelerator, *, student_reads: int) -> None:
        """Move to the accelerator's device, and follow its mixed precision."""
        placed = getattr(self.model, "hf_device_map", None) or getattr(
            self.model, "is_quantized", False
        )
        if not placed:
            self.model.to(accelerator.device)
        self._autocast = accelerator.autocast
        # Looking at ids costs a synchronisation with the device; most pairs never need it.
        self._may_meet_unknown_ids = student_reads > self._readable

    @torch.no_grad()
    def signal(self, inputs: Mapping[str, Any], targets: Tensor) -> Signal:
        """Logits of the targets, (targets, rows of the head)."""
        # Asserted at each step: a wrapper's .train() elsewhere would switch dropout on again.
        self.model.eval()
        inputs = {name: value for name, value in inputs.items() if name in self._accepted}
        if self._may_meet_unknown_ids:
            inputs["input_ids"] = known_ids(
                inputs["input_ids"],
                inputs.get("attention_mask"),
                self._readable,
                f"the teacher {self.name!r}",
            )
        with self._autocast():
            logits = self.model(**inputs, use_cache=False).logits
        return Signal(logits[targets.to(logits.device)].to(targets.device))
