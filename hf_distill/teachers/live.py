"""A teacher in the same process: frozen, in eval mode, asked batch by batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.errors import warn_once
from hf_distill.head import Head, Hidden, Logits, Signal, product_dtype
from hf_distill.pretrained import local_tokenizer
from hf_distill.stand_in import StandIn, UnusualHead
from hf_distill.vocabulary import embedding_rows, head_rows, known_ids

ALL_AT_ONCE = "The teacher makes all of its logits at once, since %s."


class LiveTeacher:
    """A causal language model as a teacher.

    Its dtype, attention and quantisation are as it was loaded; nothing here changes them.
    whole_logits: let it make all of its logits, in place of what goes into its output head
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        whole_logits: bool = False,
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self._stand_in: StandIn | None = None
        if not whole_logits:
            try:
                self._stand_in = StandIn(model)
            except UnusualHead as reason:
                warn_once(ALL_AT_ONCE, reason)
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
        """What goes into its output head at the targets; its logits where the head is unusual."""
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
            if self._stand_in is not None:
                try:
                    return self._stand_in.run(self.model, inputs, partial(_at, targets))[1]
                except UnusualHead as reason:
                    self._stand_in = None
                    warn_once(ALL_AT_ONCE, reason)
            logits = self.model(**inputs, use_cache=False).logits
        return Logits(logits[targets.to(logits.device)].to(targets.device))


def _at(targets: Tensor, hidden: Tensor, head: Head) -> tuple[Hidden, None]:
    """The head's inputs at the targets, in the dtype that it would multiply them in."""
    states = hidden[targets.to(hidden.device)].to(targets.device, product_dtype(hidden))
    return Hidden(states, head), None
