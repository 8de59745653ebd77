"""The fused head: a loss of logits that are never held whole.

For N targets and V ids the logits are the largest thing in a training step (N = 1024, V = 150k:
0.6 GB for each model in float32, several times over in autograd's copies). Here hidden states and
output heads go in, chunk by chunk; value and gradient come out of the same pass. A live teacher
costs four matrix products (logits of both models, gradient of the hidden states, gradient of the
head), a sparse one three, a frozen head one less, evaluation two.

Products run in the dtype that autocast asks for; softmax, sums within a position and the gradient
of the head in float32 at least; sums over positions in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_distill import blocks
from hf_distill.blocks import Sampled, Scratch, Sparse, Weights
from hf_distill.targets import accumulator

# About what a core's rows of one block take: of half a dozen such arrays most stay in its caches.
BLOCK_BYTES = 2**20
LEAST_MEMORY = 136 * 2**20
# Matrix products of whole tiles are some 2% faster than those a few rows off.
TILE = 32
# Ids whose logits a CPU makes at a time in float32: the head is transposed, and whole it takes the
# product a quarter longer. Narrower dtypes gain nothing.
IDS = 512
# Rows of the head whose gradient is added up at a time where it needs a float32 copy first.
SLICE = 1024
# Float32 copies of a chunk's logits that are alive together where a chunk is one block.
SCRATCH = 8
# In float16 the gradient of a logit would underflow; a power of two moves it without rounding.
FLOAT16_SCALE = 256.0


@dataclass(frozen=True)
class Finish:
    """What a model does to the product of its head.

    scale: multiplies it (Cohere's logit_scale, 1 / Granite's logits_scaling)
    cap: c in c * tanh(logits / c), Gemma's final soft-capping
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, product: Tensor) -> Tensor:
        logits = product if self.scale == 1.0 else product * self.scale
        return logits if self.cap is None else (logits / self.cap).tanh_().mul_(self.cap)

    def chain_(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """From the gradient by the finished logits to the one by the product, in place."""
        if self.cap is not None:
            gradient.mul_((logits / self.cap).square_().neg_().add_(1.0))
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


@dataclass(frozen=True)
class Head:
    """A linear output head, and what its model does to the logits afterwards.

    weight: (ids, width); bias: (ids,)
    """

    weight: Tensor
    bias: Tensor | None = None
    finish: Finish = Finish()

    def product(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden @ weight.T + bias, all in one dtype."""
        if out is None or out.device.type != "cpu" or out.dtype != torch.float32:
            logits = torch.mm(hidden, self.weight.t(), out=out)
        else:
            logits = out
            for at in range(0, len(self.weight), IDS):
                part = slice(at, at + IDS)
                torch.mm(hidden, self.weight[part].t(), out=out[:, part])
        return logits if self.bias is None else logits.add_(self.bias)

    def cast(self, dtype: torch.dtype, ids: int | None = None) -> Head:
        """The same in another dtype, or for the first so many ids only."""
        bias = None if self.bias is None else self.bias[:ids].to(dtype)
        return Head(self.weight[:ids].to(dtype), bias, self.finish)


@dataclass(frozen=True)
class Logits:
    """A teacher's logits of the targets, (targets, its ids), in any floating dtype."""

    logits: Tensor

    def __getitem__(self, rows: slice) -> Logits:
        return Logits(self.logits[rows])


@dataclass(frozen=True)
class Hidden:
    """What goes into a teacher's output head, and the head.

    states: (targets, width), in the dtype that their product is to run in
    gather: makes a head whole for as long as it is used, where its weight lies in shards
    """

    states: Tensor
    head: Head
    gather: Callable[[Head], AbstractContextManager[Head]] = nullcontext

    def __getitem__(self, rows: slice) -> Hidden:
        return Hidden(self.states[rows], self.head, self.gather)

    @contextmanager
    def whole(self) -> Iterator[Hidden]:
        """The same with a whole head. Every process has to call it as often as the others."""
        with self.gather(self.head) as head:
            yield Hidden(self.states, head)

    @property
    def logits(self) -> Tensor:
        """All of them at once, (targets, ids)."""
        with self.whole() as signal, torch.autocast(self.states.device.type, enabled=False):
            logits = signal.head.cast(self.states.dtype).product(self.states)
            return signal.head.finish(logits.float())


Signal = Logits | Hidden | Sparse | Sampled


def whole(signal: Signal | None) -> AbstractContextManager[Signal | None]:
    """A signal whose head, if it brings one, is not in shards while this lasts."""
    return signal.whole() if isinstance(signal, Hidden) else nullcontext(signal)


def fused_loss(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    signal: Signal | None,
    weights: Weights,
    *,
    scale: Tensor,
    memory_mb: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What some targets cost, times `scale`, and the values that it is made of.

    hidden: (targets, width), the student's; labels: (targets,) int64, none of them ignored
    scale: 0-dim, one over the number of targets in the step
    memory_mb: how much the logits of both models may take at a time; see `default_memory`
    returns: a 0-dim loss that can be differentiated once, by hidden, head.weight and head.bias;
        and (targets,) each, without gradient, `ce` and with a signal `divergence`. Where gradients
        are off, also `teacher_ce` and `top1_agreement` (see `blocks.values_only`)
    raises: RuntimeError at a second backward, since the gradients are made in forward and given
        away in the first
    """
    dtype = product_dtype(hidden)
    work = _Pass(head, labels, signal, weights, scale, memory_mb, dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        if torch.is_grad_enabled():
            loss = _Differentiable.apply(hidden, head.weight, head.bias, work)
        else:
            loss, _ = work.run(hidden.to(dtype))
    return loss, work.values


def product_dtype(hidden: Tensor) -> torch.dtype:
    """What a linear layer would multiply these states in, here and now."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def default_memory(head: Head) -> float:
    """Bytes for the logits of a chunk: 136 MB, or more where the head is large.

    Each chunk reads and writes the head's gradient once, which has to be little beside its
    products: chunks of 110 targets at 152k ids took a third longer than the products alone.
    """
    return max(LEAST_MEMORY, 0.75 * 4 * head.weight.numel())


class _Differentiable(torch.autograd.Function):
    """Makes the gradients in forward, hands them over in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Pass
    ) -> Tensor:
        wanted = ctx.needs_input_grad[:3]
        loss, ctx.gradients = work.run(hidden.to(work.dtype), *wanted)
        ctx.late_scale = work.late_scale
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError(
                "second backward through the fused head, whose gradients were made in forward and "
                "given away in the first: compute the loss again, or set fused_head=False"
            )
        gradients, ctx.gradients = ctx.gradients, None
        factor = grad_output if ctx.late_scale is None else grad_output * ctx.late_scale
        # Looking at a number is free on a CPU, and saves a pass over the head's gradient.
        unchanged = factor.device.type == "cpu" and factor.item() == 1.0
        for gradient in gradients:
            if gradient is not None and not unchanged:
                gradient.mul_(factor)
        pairs = zip(gradients, ctx.dtypes, strict=True)
        return *(
            None if gradient is None else gradient.to(dtype) for gradient, dtype in pairs
        ), None


class _Pass:
    """One pass over the targets of a micro-batch, chunk by chunk."""

    def __init__(
        self,
        head: Head,
        labels: Tensor,
        signal: Signal | None,
        weights: Weights,
        scale: Tensor,
        memory_mb: float | None,
        dtype: torch.dtype,
    ) -> None:
        self.labels, self.signal, self.weights = labels, signal, weights
        self.memory = default_memory(head) if memory_mb is None else memory_mb * 2**20
        self.dtype = dtype
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.head = head
        self.scratch = Scratch(self.wide, labels.device)
        self.scale = scale.to(self.wide)
        # float16 meets its loss scale in backward only, so what makes gradients small comes there.
        self.late_scale = self.scale / FLOAT16_SCALE if dtype == torch.float16 else None
        self.values: dict[str, Tensor] = {}

    def run(
        self,
        hidden: Tensor,
        of_hidden: bool = False,
        of_weight: bool = False,
        of_bias: bool = False,
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The loss, and in float32 at least the gradients that are asked for."""
        with whole(self.signal) as self.signal:
            return self._run(hidden, of_hidden, of_weight, of_bias)

    def _run(
        self, hidden: Tensor, of_hidden: bool, of_weight: bool, of_bias: bool
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        gradient = of_hidden or of_weight or of_bias
        self.head, signal = self.head.cast(self.dtype), self._narrow(all_ids=not gradient)
        ids = len(self.head.weight)
        d_hidden = hidden.new_empty(hidden.shape, dtype=self.wide) if of_hidden else None
        d_weight = hidden.new_empty(self.head.weight.shape, dtype=self.wide) if of_weight else None
        d_bias = hidden.new_zeros(ids, dtype=self.wide) if of_bias else None
        chunks = self._chunks(ids, signal)
        ours = _Buffer(self.head, chunks[0])
        theirs = _Buffer(signal.head, chunks[0]) if isinstance(signal, Hidden) else None
        found = []
        for chunk in chunks:
            states = hidden[chunk]
            logits = ours.product(states)
            teacher = None if signal is None else signal[chunk]
            if isinstance(teacher, Hidden):
                assert theirs is not None
                teacher = Logits(theirs.product(teacher.states))
            found.append(self._judge_(logits, self.labels[chunk], teacher, gradient))
            if d_hidden is not None:
                d_hidden[chunk] = torch.mm(logits, self.head.weight)
            if d_weight is not None:
                # Scaling the few hidden states scales the head's gradient, for nothing.
                scaled = states if self.late_scale is not None else states * self.scale
                add = chunk.start > 0
                _product_(d_weight, logits, scaled.to(self.dtype), add=add)
            if d_bias is not None:
                d_bias += logits.sum(0, dtype=self.wide)
        for gradient_of in (d_hidden, d_bias):
            if gradient_of is not None and self.late_scale is None:
                gradient_of.mul_(self.scale)
        self.values = {name: torch.cat([part[name] for part in found]) for name in found[0]}
        return self._loss(), (d_hidden, d_weight, d_bias)

    def _narrow(self, all_ids: bool) -> Signal | None:
        """The signal; of a teacher's head only the rows that the divergence looks at."""
        signal = self.signal
        if not isinstance(signal, Hidden):
            return signal
        ids = None if all_ids else self.weights.shared
        return Hidden(signal.states, signal.head.cast(signal.states.dtype, ids))

    def _chunks(self, ids: int, signal: Signal | None) -> list[slice]:
        """Equal parts of the targets, each with logits that fit into the memory."""
        row = ids * self.dtype.itemsize
        if isinstance(signal, Hidden):
            row += len(signal.head.weight) * signal.states.dtype.itemsize
        if self.labels.device.type != "cpu":
            row += SCRATCH * ids * self.wide.itemsize
        targets = len(self.labels)
        number = max(1, math.ceil(targets * row / self.memory))
        size = max(1, math.ceil(targets / number))
        if (tiles := math.ceil(size / TILE) * TILE) * row <= self.memory:
            size = tiles
        return [slice(at, min(at + size, targets)) for at in range(0, max(targets, 1), size)]

    def _judge_(
        self, logits: Tensor, labels: Tensor, teacher: Signal | None, gradient: bool
    ) -> dict[str, Tensor]:
        """The values of a chunk, whose logits become the gradient by themselves."""
        rows = len(logits)
        if logits.device.type == "cpu":  # elsewhere one launch for all rows is faster
            each = round(BLOCK_BYTES / (logits.shape[1] * self.wide.itemsize))
            rows = max(1, each) * torch.get_num_threads()  # a row is one thread's
        found = []
        for at in range(0, max(len(logits), 1), max(rows, 1)):
            part = slice(at, at + rows)
            self.scratch.reuse()
            block = self.head.finish(self._wide(logits[part]))
            theirs = None if teacher is None else self._finished(teacher[part])
            if not gradient:
                found.append(
                    blocks.values_only(block, labels[part], theirs, self.weights, self.scratch)
                )
                continue
            out = (
                logits[part] if logits.dtype == self.wide and self.head.finish.cap is None else None
            )
            values, slopes = blocks.judge(
                block, labels[part], theirs, self.weights, out=out, new=self.scratch
            )
            self.head.finish.chain_(slopes, block)
            if self.late_scale is not None:
                slopes.mul_(FLOAT16_SCALE)
            if slopes is not out:
                logits[part] = slopes
            found.append(values)
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    def _finished(self, teacher: Signal) -> Tensor | Sparse | Sampled:
        if isinstance(teacher, Sparse | Sampled):
            return teacher
        assert isinstance(teacher, Logits)
        logits = self._wide(teacher.logits)
        # What came from a teacher's head is a plain product still; handed-over logits are not.
        return self.signal.head.finish(logits) if isinstance(self.signal, Hidden) else logits

    def _wide(self, logits: Tensor) -> Tensor:
        return logits if logits.dtype == self.wide else self.scratch(logits).copy_(logits)

    def _loss(self) -> Tensor:
        weighed = {"ce": self.weights.ce, "divergence": self.weights.divergence}
        weighed["divergence"] *= self.weights.temperature**2
        total = self.scale.new_zeros((), dtype=accumulator(self.scale))
        for name, weight in weighed.items():
            if name in self.values:
                total = total + weight * self.values[name].sum(dtype=total.dtype)
        return (total * self.scale).to(self.wide)


class _Buffer:
    """Memory for the logits of one chunk, used again by the next."""

    def __init__(self, head: Head, longest: slice) -> None:
        self.head = head
        self.logits = head.weight.new_empty(longest.stop - longest.start, len(head.weight))

    def product(self, states: Tensor) -> Tensor:
        return self.head.product(states, out=self.logits[: len(states)])


def _product_(total: Tensor, logits: Tensor, states: Tensor, *, add: bool) -> None:
    """total (+)= logits.T @ states. A narrow product is made wide some rows at a time."""
    if logits.dtype == total.dtype:
        torch.addmm(total, logits.t(), states, beta=float(add), out=total)
        return
    narrow = states.new_empty(min(SLICE, len(total)), states.shape[1])
    for at in range(0, len(total), SLICE):
        part = slice(at, at + SLICE)
        columns = logits[:, part].t()
        product = torch.mm(columns, states, out=narrow[: len(columns)])
        total[part].add_(product) if add else total[part].copy_(product)
