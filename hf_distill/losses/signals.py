"""Signals: the forms in which a model's output distributions are given, at the targets of a batch.

A teacher returns one of four signals; the objective accepts all of them. `Logits` and `Hidden` are
also the two forms in which a student's own outputs reach the objective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_distill.losses.linear_head import LinearHead


@dataclass(frozen=True)
class Logits:
    """Logits of the targets, (targets, ids), in any floating dtype."""

    logits: Tensor

    def __getitem__(self, rows: slice) -> Logits:
        return Logits(self.logits[rows])


@dataclass(frozen=True)
class Hidden:
    """The inputs of an output head, and the head.

    states: (targets, width), on the device where the product is to be computed, in its dtype
    gather: a context in which a sharded head has its whole weight
    """

    states: Tensor
    head: LinearHead
    gather: Callable[[LinearHead], AbstractContextManager[LinearHead]] = nullcontext

    def __getitem__(self, rows: slice) -> Hidden:
        return Hidden(self.states[rows], self.head, self.gather)

    @contextmanager
    def whole(self) -> Iterator[Hidden]:
        """The same with a whole head. With a sharded head, a collective of all processes."""
        with self.gather(self.head) as head:
            yield Hidden(self.states, head)

    @property
    def logits(self) -> Tensor:
        """All logits at once, (targets, ids), float32 or wider, on the device of the states."""
        with self.whole() as signal, torch.autocast(self.states.device.type, enabled=False):
            product = signal.head.cast(self.states.dtype).product(self.states)
            wide = product if product.dtype == torch.float64 else product.float()
            return signal.head.transform(wide)


@dataclass(frozen=True)
class TopK:
    """The k likeliest ids and the probability of all others together.

    ids: (targets, k) int64, -1 where a target has fewer than k; the first is always present
    log_probs: (targets, k) at the objective's temperature; log_tail: (targets,), finite
    """

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor

    def __getitem__(self, rows: slice) -> TopK:
        return TopK(self.ids[rows], self.log_probs[rows], self.log_tail[rows])


@dataclass(frozen=True)
class Sampled:
    """Draws from the distribution: an unbiased estimate of the forward KL, and of it only.

    ids: (targets, most) int64, -1 beyond a target's own; weights: the same shape, how often each
        id was drawn over the number of draws, 0 where there is none
    entropy: (targets,), of the whole distribution, in nats
    Source: RS-KD, arXiv:2503.16870.
    """

    ids: Tensor
    weights: Tensor
    entropy: Tensor

    def __getitem__(self, rows: slice) -> Sampled:
        return Sampled(self.ids[rows], self.weights[rows], self.entropy[rows])

    @property
    def slots(self) -> Tensor:
        """The ids with -1 replaced by 0, usable as an index; their weight is 0."""
        return self.ids.clamp(min=0)

    def value(self, log_q: Tensor) -> Tensor:
        """The estimate of the forward KL, (targets,), which may be negative.

        log_q: (targets, most), the student's log-probabilities of the slots
        """
        return -self.entropy - (self.weights * log_q).sum(-1)


Signal = Logits | Hidden | TopK | Sampled


def whole(signal: Signal | None) -> AbstractContextManager[Signal | None]:
    """A context in which the signal's head, if it has one, is not in shards."""
    return signal.whole() if isinstance(signal, Hidden) else nullcontext(signal)
