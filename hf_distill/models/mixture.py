"""Draw each token from a mixture of two models' distributions.

Source: MiniLLM, arXiv:2306.08543, equation 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from hf_distill.errors import InputError
from hf_distill.models.base import base_model
from hf_distill.models.positions import PositionCounter


@dataclass(frozen=True)
class Mixture:
    """A second model, mixed into the distribution that a causal model samples from.

    share: its weight in the mixture, above 0 and below 1
    outcomes: number of ids, from 0 on, that both models share
    active: a context in which the second model has its own weights (an adapter is switched)
    """

    model: nn.Module
    share: float
    outcomes: int
    active: Callable[[], AbstractContextManager[None]]

    def processor(self, mask: Tensor) -> LogitsProcessor:
        """For one call of `generate`. mask: of its prompts, (rows, positions)"""
        return _Mixed(self, mask)


class _Mixed(LogitsProcessor):
    """Turns the scores of `generate` into the log-probabilities of the mixture.

    The second model reads the generated tokens one by one, with its own cache.
    """

    def __init__(self, mixture: Mixture, mask: Tensor) -> None:
        self.mixture, self._mask, self._cache = mixture, mask, None
        plain: Any = base_model(mixture.model)
        self._positions = PositionCounter(plain)
        self._read = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = self._logits(input_ids)
        # What `generate` has excluded (suppressed ids) stays excluded.
        theirs = torch.full_like(scores, -torch.inf, dtype=torch.float32)
        theirs[:, : logits.shape[1]] = logits
        theirs = theirs.masked_fill(scores == -torch.inf, -torch.inf).log_softmax(-1)
        share = self.mixture.share
        return torch.logaddexp(
            scores.float().log_softmax(-1) + math.log1p(-share), theirs + math.log(share)
        )

    def _logits(self, input_ids: Tensor) -> Tensor:
        """Of the next token, (rows, outcomes) float32."""
        more = input_ids.shape[1] - self._mask.shape[1]
        self._mask = torch.nn.functional.pad(self._mask, (0, more), value=1)
        new = input_ids[:, self._read :]
        inputs: dict[str, Any] = {"input_ids": new, "attention_mask": self._mask}
        if self._positions.applies:
            inputs["position_ids"] = self._positions(self._mask)[:, self._read :]
        with self.mixture.active():
            found = self.mixture.model(**inputs, past_key_values=self._cache, use_cache=True)
        self._cache, self._read = getattr(found, "past_key_values", None), input_ids.shape[1]
        if self._cache is None:
            raise InputError(
                "teacher_mix needs a teacher with a cache of keys and values, but "
                f"{type(base_model(self.mixture.model)).__name__} does not: set teacher_mix to 0"
            )
        return found.logits[:, -1, : self.mixture.outcomes].float()
