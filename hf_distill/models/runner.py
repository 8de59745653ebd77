"""Run a model on a batch and return the inputs of its output head at the targets.

The trainer (for the student), live teachers, recordings and evaluation all run their models here.
This module selects the entries of a batch that the forward takes, makes position ids, refuses rows
that the model cannot read, follows autocast, replaces the output head, and falls back to whole
logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hf_distill.errors import InputError, warn_once
from hf_distill.losses.fused_head import product_dtype
from hf_distill.losses.linear_head import LinearHead
from hf_distill.losses.signals import Hidden, Logits
from hf_distill.losses.targets import Targets
from hf_distill.models.base import base_model
from hf_distill.models.from_scratch import max_positions
from hf_distill.models.output_head import HeadReplacement, UnsupportedHead
from hf_distill.models.positions import PositionCounter, left_padded, position_limit
from hf_distill.models.probes import ignores_padding
from hf_distill.models.vocabulary import embedding_rows, head_rows, known_ids

T = TypeVar("T")
# Where packed documents begin, for attention kernels. Forwards take them as further keywords.
PACKING = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


class ModelRunner:
    """One model, ready to be run on batches.

    model: a transformers or `peft` model, not yet wrapped by an engine
    role: "student", "teacher 'gpt2'", for messages
    outcomes: how many the logits are for, by default the rows of the output head
    read: the logits of a forward, (rows, positions, outcomes), of its outputs and the batch
    withheld: entries of a batch that are for `read` only
    fused: return the inputs of the output head instead of logits, if the head can be replaced
    adapter: see `HeadReplacement`
    strict: hand every column of a batch to the forward, which refuses unknown ones, as Trainer does
    """

    def __init__(
        self,
        model: Any,
        role: str,
        *,
        outcomes: int | None = None,
        read: Callable[[Any, Mapping[str, Any]], Tensor] = lambda outputs, inputs: outputs.logits,
        withheld: Collection[str] = (),
        fused: bool = True,
        adapter: str | None = None,
        strict: bool = False,
    ) -> None:
        self.model, self.role = model, role
        plain: Any = base_model(model)
        self.outcomes = head_rows(plain) if outcomes is None else outcomes
        self.embedding_rows = embedding_rows(plain)
        self._read, self._withheld = read, frozenset(withheld)
        self.position_limit = position_limit(plain)
        # Rotary positions go on beyond those that the config states, but text should not.
        self.longest_text = self.position_limit or max_positions(plain.config)
        parameters = inspect.signature(plain.forward).parameters
        # A forward of `**kwargs` alone names nothing to filter by.
        self._accepted = None if strict or "input_ids" not in parameters else set(parameters)
        if self._accepted is not None and any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            self._accepted |= PACKING
        # Encoders have no cache. Their forwards would hand the keyword on to their layers.
        caches = "use_cache" in parameters or "input_ids" not in parameters
        self.options = {"use_cache": False} if caches else {}
        self._positions = PositionCounter(plain)
        self._padding_is_unchecked = True
        self.may_meet_unknown_ids = True
        self.autocast: Callable[[], AbstractContextManager[None]] = nullcontext
        self._head: HeadReplacement | None = None
        if fused:
            try:
                self._head = HeadReplacement(plain, adapter)
            except UnsupportedHead as reason:
                self.use_whole_logits(reason)

    @property
    def fused(self) -> bool:
        """Whether the inputs of the output head are handed over instead of logits."""
        return self._head is not None

    def use_whole_logits(self, reason: object) -> None:
        """Stop replacing the output head, and log the reason."""
        self._head = None
        warn_once("The %s makes all of its logits at once, since %s.", self.role, reason)

    def run(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        targets: Targets,
        use: Callable[[Hidden | Logits], tuple[T, Tensor | None]],
        *,
        whole_logits: bool = False,
    ) -> tuple[T, Any, Tensor | None]:
        """Run one forward and call `use` with what was found at the targets.

        model: the model of this runner, or what an engine has made of it
        batch: without labels; use: returns a result, and a loss if one is to be trained on
        whole_logits: the caller needs `outputs.logits`
        returns: the result, the model's outputs, and if the head was replaced a 0-dim zero to add
            to the loss, for hooks that wait for the gradient of the outputs
        """
        inputs = self.inputs(batch) | self.options
        try:
            if self._head is not None and not whole_logits:
                gather = self._head.gathered

                def at_the_head(hidden: Tensor, head: LinearHead) -> tuple[T, Tensor | None]:
                    return use(Hidden(targets.select(hidden), head, gather))

                try:
                    outputs, result = self._head.forward(model, inputs, at_the_head)
                    return result, outputs, 0.0 * outputs.logits.sum()
                except UnsupportedHead as reason:
                    self.use_whole_logits(reason)
            outputs = model(**inputs)
        except IndexError:
            self._explain(inputs)
            raise
        result, _ = use(Logits(targets.select(self._read(outputs, batch))))
        return result, outputs, None

    @torch.no_grad()
    def signal(
        self, batch: Mapping[str, Any], targets: Targets, model: nn.Module | None = None
    ) -> Hidden | Logits:
        """Run the model without gradients, in its own autocast, and return its signal.

        batch: without labels; model: as in `run`, by default the runner's own
        returns: logits on the device of the targets; or the inputs of the output head, on the
            device where it runs, in the dtype that it would multiply in
        """
        device = targets.index.device

        def keep(found: Hidden | Logits) -> tuple[Hidden | Logits, None]:
            if isinstance(found, Logits):
                return Logits(found.logits.to(device)), None
            return Hidden(
                found.states.to(product_dtype(found.states)), found.head, found.gather
            ), None

        with self.autocast():
            found = self.run(self.model if model is None else model, batch, targets, keep)[0]
        if isinstance(found, Hidden) and self._head is not None:
            # After the forward an offloaded head has left its device. The head that was seen inside
            # it would stay on the device until the signal is used, and be loaded a second time.
            return Hidden(found.states, self._head.head, found.gather)
        return found

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The keywords for the model's forward.

        raises: InputError for a row that is too long, or that has an id the embedding lacks
        """
        accepted = self._accepted
        inputs = {
            k: v
            for k, v in batch.items()
            if (accepted is None or k in accepted) and k not in self._withheld
        }
        ids, mask = inputs.get("input_ids"), batch.get("attention_mask")
        self.check_length(batch)
        # On an accelerator this waits for the device, so it is done only if it may be needed.
        if ids is not None and (self.may_meet_unknown_ids or ids.device.type == "cpu"):
            inputs["input_ids"] = known_ids(
                ids, _two_dimensional(mask), self.embedding_rows, f"the {self.role}"
            )
        if (mask := _two_dimensional(mask)) is not None and "position_ids" not in inputs:
            self._count_positions(inputs, mask)
        return inputs

    def _count_positions(self, inputs: dict[str, Any], mask: Tensor) -> None:
        """Add position ids for left-padded rows; elsewhere the model's own are right."""
        # On an accelerator, looking at the mask would wait for the device at every batch.
        looks = mask.device.type == "cpu" or self._padding_is_unchecked
        padded = looks and bool(left_padded(mask))
        if padded and self._padding_is_unchecked and not torch.distributed.is_initialized():
            if ignores_padding(base_model(self.model)):
                warn_once(
                    "The %s ignores the attention mask, so its loss on rows padded on the left "
                    "differs from that on unpadded rows: pad on the right.",
                    self.role,
                )
            self._padding_is_unchecked = False
        if mask.device.type != "cpu":
            self._padding_is_unchecked = False
        if self._positions.applies and (padded or mask.device.type != "cpu"):
            inputs["position_ids"] = self._positions(mask)

    def check_length(self, batch: Mapping[str, Any]) -> None:
        """InputError for rows that are longer than the model's table of positions."""
        limit = self.position_limit
        for name in ("input_ids", "decoder_input_ids"):
            ids = batch.get(name)
            if limit is not None and ids is not None and ids.shape[-1] > limit:
                raise InputError(_too_long(ids.shape[-1], self.role, limit))

    def _explain(self, inputs: Mapping[str, Any]) -> None:
        """InputError for an IndexError that a row beyond the stated positions explains."""
        stated, ids = max_positions(base_model(self.model).config), inputs.get("input_ids")
        if ids is not None and stated is not None and ids.shape[-1] > stated:
            raise InputError(_too_long(ids.shape[-1], self.role, stated))


def _too_long(tokens: int, role: str, limit: int) -> str:
    return (
        f"a row has {tokens} tokens, but the {role} takes {limit} at most: tokenize with "
        "truncation=True and max_length, or cut the rows"
    )


def _two_dimensional(mask: Any) -> Tensor | None:
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
