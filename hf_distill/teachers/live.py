"""A teacher in the same process: frozen, in eval mode, asked batch by batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.errors import warn_once
from hf_distill.losses.fused_head import Head, Hidden, Logits, Signal, product_dtype
from hf_distill.models.loading import local_tokenizer
from hf_distill.models.output_head import StandIn, UnusualHead
from hf_distill.models.vocabulary import embedding_rows, head_rows, known_ids
from hf_distill.teachers.placement import check_placement, place

ALL_AT_ONCE = "The teacher makes all of its logits at once, since %s."


class LiveTeacher:
    """A causal language model as a teacher.

    Its dtype, attention and quantisation are as it was loaded; nothing here changes them.
    whole_logits: let it make all of its logits, in place of what goes into its output head
    placement: "auto", "replicated", "sharded" or "offloaded"; see docs/scaling.md
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        whole_logits: bool = False,
        placement: str = "auto",
    ) -> None:
        check_placement(placement)
        self._ask(model, tokenizer, whole_logits=whole_logits)
        self.model.requires_grad_(False).eval()
        self._placement = placement
        self._where: str | None = None

    def _ask(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        whole_logits: bool,
        adapter: str | None = None,
    ) -> None:
        """What to know of a model before it is asked; see `StandIn` for the adapter."""
        self.model = model
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._stand_in: StandIn | None = None
        if not whole_logits:
            try:
                self._stand_in = StandIn(plain, adapter)
            except UnusualHead as reason:
                warn_once(ALL_AT_ONCE, reason)
        self.name = plain.config.name_or_path or type(plain).__name__
        self.rows = head_rows(plain)
        self.tokenizer = tokenizer or local_tokenizer(plain.config.name_or_path)
        self._readable = embedding_rows(plain)
        self._accepted = set(inspect.signature(plain.forward).parameters)
        self._may_meet_unknown_ids = True
        self._autocast: Callable[[], AbstractContextManager[None]] = nullcontext
        self.together = False

    def prepare(self, accelerator: Accelerator, *, student_reads: int) -> None:
        """Take its place, say where that is, and follow the accelerator's mixed precision."""
        if self._where is None:
            self._where = place(self.model, self._placement, accelerator)
            self.together = self._where.startswith("sharded")
            accelerator.print(f"teacher: {Path(self.name).name}, {self._where}")
        self._follow(accelerator, student_reads)

    def _follow(self, accelerator: Accelerator, student_reads: int) -> None:
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
                    return self._stand_in.run(self.model, inputs, self._at(targets))[1]
                except UnusualHead as reason:
                    self._stand_in = None
                    warn_once(ALL_AT_ONCE, reason)
            logits = self.model(**inputs, use_cache=False).logits
        return Logits(logits[targets.to(logits.device)].to(targets.device))

    def _at(self, targets: Tensor) -> Callable[[Tensor, Head], tuple[Hidden, None]]:
        """The head's inputs at the targets, in the dtype that it would multiply them in."""
        assert self._stand_in is not None
        gather = self._stand_in.whole_head

        def use(hidden: Tensor, head: Head) -> tuple[Hidden, None]:
            states = hidden[targets.to(hidden.device)].to(targets.device, product_dtype(hidden))
            return Hidden(states, head, gather), None

        return use
