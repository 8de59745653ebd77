"""The fused head: the objective at the output head, without whole logits.

For N targets and V ids the logits are the largest tensor of a training step (N = 1024, V = 150k:
0.6 GB for each model in float32, several times over in autograd's copies). This module takes
hidden states and output heads instead and works chunk by chunk. Value and gradient come out of the
same pass: a live teacher costs four matrix products (logits of both models, gradient of the hidden
states, gradient of the head), a sparse one three, a frozen head one less, evaluation two.

Products run in the dtype of autocast. Softmax, sums within a position and the gradient of the head
are in float32 at least, sums over positions in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_distill.losses.kernels import kernel_for
from hf_distill.losses.linear_head import LinearHead, LogitTransform
from hf_distill.losses.signals import Hidden, Logits, Signal, whole
from hf_distill.losses.targets import accumulator
from hf_distill.losses.weights import Weights, weighted_sum

LEAST_MEMORY = 136 * 2**20
# Matrix products of whole tiles are about 2% faster than those a few rows off.
TILE = 32
# Rows of the head whose gradient is accumulated at a time where it needs a float32 copy first.
SLICE = 1024
# Targets of a chunk on an accelerator: enough for its products to run at full speed.
ACCELERATOR_ROWS = 2048
# Accelerators read and write rows of logits in wide units only if each begins at a multiple.
ALIGNED_IDS = 64
# In float16 small gradients of logits underflow. A power of two moves them without rounding.
FLOAT16_SCALE = 256.0


def fused_loss(
    hidden: Tensor,
    head: LinearHead,
    labels: Tensor,
    signal: Signal | None,
    weights: Weights,
    *,
    scale: Tensor,
    memory_mb: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return `scale` times the weighted loss of some targets, and the values it is made of.

    hidden: (targets, width), the student's; labels: (targets,) int64, none of them ignored
    scale: 0-dim, usually one over the number of targets in the step
    memory_mb: memory for the logits of both models at a time; by default `default_memory`, on an
        accelerator enough for 2,048 targets
    returns: a 0-dim loss that can be differentiated once, with respect to hidden, head.weight and
        head.bias; and without gradient, (targets,) each, `ce` and with a signal `divergence`. If
        gradients are off, also `teacher_ce` and `top1_agreement` (see `kernels.torch.values`)
    raises: RuntimeError at a second backward, since the gradients are computed in forward and
        released by the first backward
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
    """The dtype in which a linear layer would multiply these states in the current autocast."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def default_memory(head: LinearHead) -> float:
    """Bytes for the logits of a chunk on a CPU: 136 MB, or more where the head is large.

    Each chunk reads and writes the head's gradient once, which must be cheap compared with its
    products: chunks of 110 targets at 152k ids took a third longer than the products alone.
    """
    return max(LEAST_MEMORY, 0.75 * 4 * head.weight.numel())


class _Differentiable(torch.autograd.Function):
    """Computes the gradients in forward and returns them in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Pass
    ) -> Tensor:
        wanted = ctx.needs_input_grad[:3]
        loss, ctx.gradients = work.run(hidden.to(work.dtype), *wanted)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError(
                "second backward through the fused head, whose gradients were released by the "
                "first: compute the loss again, or set fused_head=False"
            )
        gradients, ctx.gradients = ctx.gradients, None
        # On a CPU, reading the factor costs nothing and saves a pass over the gradient if it is 1.
        unchanged = grad_output.device.type == "cpu" and grad_output.item() == 1.0
        for gradient in gradients:
            if gradient is not None and not unchanged:
                gradient.mul_(grad_output)
        pairs = zip(gradients, ctx.dtypes, strict=True)
        return *(
            None if gradient is None else gradient.to(dtype) for gradient, dtype in pairs
        ), None


class _Pass:
    """One pass over the targets of a micro-batch, chunk by chunk."""

    def __init__(
        self,
        head: LinearHead,
        labels: Tensor,
        signal: Signal | None,
        weights: Weights,
        scale: Tensor,
        memory_mb: float | None,
        dtype: torch.dtype,
    ) -> None:
        self.labels, self.signal = labels, signal
        self.memory = None if memory_mb is None else memory_mb * 2**20
        self.dtype = dtype
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.weights = weights.to(self.wide)
        self.head = head
        self.kernel = kernel_for(self.wide, labels.device, weights.function)
        self.scale = scale.to(self.wide)
        self.values: dict[str, Tensor] = {}

    def run(
        self,
        hidden: Tensor,
        of_hidden: bool = False,
        of_weight: bool = False,
        of_bias: bool = False,
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Return the loss and, in float32 at least, the gradients that are asked for."""
        with whole(self.signal) as self.signal:
            return self._run(hidden, of_hidden, of_weight, of_bias)

    def _run(
        self, hidden: Tensor, of_hidden: bool, of_weight: bool, of_bias: bool
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        gradient = of_hidden or of_weight or of_bias
        self.head, signal = self.head.cast(self.dtype), self._narrow(all_ids=not gradient)
        ids, half = len(self.head.weight), self.dtype == torch.float16
        d_hidden = hidden.new_empty(hidden.shape, dtype=self.wide) if of_hidden else None
        d_weight = hidden.new_empty(self.head.weight.shape, dtype=self.wide) if of_weight else None
        d_bias = hidden.new_zeros(ids, dtype=self.wide) if of_bias else None
        chunks = self._chunks(ids, signal)
        student_buffer = _Buffer(self.head, chunks[0])
        teacher_buffer = _Buffer(signal.head, chunks[0]) if isinstance(signal, Hidden) else None
        found = []
        for chunk in chunks:
            states = hidden[chunk]
            logits = student_buffer.product(states)
            teacher = None if signal is None else signal[chunk]
            if isinstance(teacher, Hidden):
                assert teacher_buffer is not None
                # A teacher with a device map may have its head elsewhere.
                teacher = Logits(teacher_buffer.product(teacher.states).to(logits.device))
            found.append(
                self._evaluate_(logits, self.labels[chunk], teacher, self.weights[chunk], gradient)
            )
            if d_hidden is not None:
                product = _float16_product if half else torch.mm
                d_hidden[chunk] = product(logits, self.head.weight)
            if d_weight is not None:
                # Scaling the few hidden states scales the head's gradient at no cost. float16 has
                # too small a range for it, and is scaled below.
                scaled = states if half else (states * self.scale).to(self.dtype)
                _add_product_(d_weight, logits, scaled, add=chunk.start > 0)
            if d_bias is not None:
                d_bias += logits.sum(0, dtype=self.wide)
        factor = self.scale / FLOAT16_SCALE if half else self.scale
        for gradient_of in (d_hidden, d_bias, d_weight if half else None):
            if gradient_of is not None:
                gradient_of.mul_(factor)
        self.values = {name: torch.cat([part[name] for part in found]) for name in found[0]}
        return self._loss(), (d_hidden, d_weight, d_bias)

    def _narrow(self, all_ids: bool) -> Signal | None:
        """The signal, its head restricted to the ids that the divergence uses."""
        signal = self.signal
        if not isinstance(signal, Hidden):
            return signal
        ids = None if all_ids else self.weights.shared
        return Hidden(signal.states, signal.head.cast(signal.states.dtype, ids))

    def _chunks(self, ids: int, signal: Signal | None) -> list[slice]:
        """Equal parts of the targets, each with logits that fit into the memory."""
        row, on_cpu = ids * self.dtype.itemsize, self.labels.device.type == "cpu"
        if isinstance(signal, Hidden):
            row += len(signal.head.weight) * signal.states.dtype.itemsize
        row += self.kernel.extra_bytes * ids
        memory = self.memory
        if memory is None:
            whole_rows = 0 if on_cpu or self.kernel.extra_bytes else ACCELERATOR_ROWS * row
            memory = whole_rows or default_memory(self.head)
        targets = len(self.labels)
        number = max(1, math.ceil(targets * row / memory))
        size = max(1, math.ceil(targets / number))
        if (tiles := math.ceil(size / TILE) * TILE) * row <= memory:
            size = tiles
        return [slice(at, min(at + size, targets)) for at in range(0, max(targets, 1), size)]

    def _evaluate_(
        self,
        logits: Tensor,
        labels: Tensor,
        teacher: Signal | None,
        weights: Weights,
        gradient: bool,
    ) -> Mapping[str, Tensor]:
        """Return the values of a chunk; with `gradient`, replace its logits by their gradient."""
        assert not isinstance(teacher, Hidden)
        # The product of a teacher's head still needs its transform; given logits do not.
        theirs = self.signal.head.transform if isinstance(self.signal, Hidden) else LogitTransform()
        return self.kernel(
            logits, labels, teacher, weights,
            transform=self.head.transform, teacher_transform=theirs, gradient=gradient,
            factor=FLOAT16_SCALE if self.dtype == torch.float16 else 1.0,
        )  # fmt: skip

    def _loss(self) -> Tensor:
        weights, dtype = self.weights, accumulator(self.scale)
        total = weighted_sum(self.values["ce"], weights.ce, dtype)
        if "divergence" in self.values:
            divergence = weighted_sum(self.values["divergence"], weights.divergence, dtype)
            total = total + weights.temperature**2 * divergence
        return (total * self.scale).to(self.wide)


class _Buffer:
    """Memory for the logits of one chunk, used again by the next."""

    def __init__(self, head: LinearHead, longest: slice) -> None:
        self.head, ids = head, len(head.weight)
        padded = ids if head.weight.device.type == "cpu" else -(-ids // ALIGNED_IDS) * ALIGNED_IDS
        self.logits = head.weight.new_empty(longest.stop - longest.start, padded)[:, :ids]

    def product(self, states: Tensor) -> Tensor:
        return self.head.product(states, out=self.logits[: len(states)])


def _add_product_(total: Tensor, logits: Tensor, states: Tensor, *, add: bool) -> None:
    """total (+)= logits.T @ states, accumulated in the dtype of the total."""
    if logits.dtype == total.dtype:
        torch.addmm(total, logits.t(), states, beta=float(add), out=total)
    elif _widens(total):
        # One product, whose float32 sums are never rounded to a narrower dtype between chunks.
        wide = total.dtype
        torch.addmm(total, logits.t(), states, out_dtype=wide, beta=float(add), out=total)
    else:
        for start in range(0, len(total), SLICE):  # a narrow product is widened some rows at a time
            part = slice(start, start + SLICE)
            columns = logits[:, part].t()
            half = logits.dtype == torch.float16
            product = _float16_product(columns, states) if half else torch.mm(columns, states)
            total[part].add_(product) if add else total[part].copy_(product)


def _float16_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b summed and returned in float32.

    In float16 the sum itself can overflow: one outlier dimension of the hidden states and a
    frequent label are enough. No loss scale could prevent it, since gradients are made in forward.
    """
    if _widens(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def _widens(tensor: Tensor) -> bool:
    """Whether matrix products here can return another dtype than that of their factors."""
    return tensor.device.type == "cuda" and "dtype_out" in torch.ops.aten.addmm.overloads()
