"""The fused head against whole logits and autograd, and against float64 by another route."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_closed_forms import DIVERGENCES
from torch import Tensor
from torch.nn import functional as F

from hf_distill.losses import divergences
from hf_distill.losses import fused_head as head
from hf_distill.losses.fused_head import fused_loss
from hf_distill.losses.kernels import torch as kernel
from hf_distill.losses.linear_head import LinearHead, LogitTransform
from hf_distill.losses.signals import Hidden, Logits, Signal, TopK
from hf_distill.losses.weights import Weights

FUNCTIONS = [*DIVERGENCES, oracle.squared_hellinger]
ENDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "cap": {"cap": 3.0},
    "all": {"bias": True, "scale": 1.7, "cap": 5.0},
}


class Batch:
    """Some targets with the heads of student and teacher."""

    def __init__(
        self,
        targets: int = 11,
        ids: int = 37,
        teacher_ids: int | None = None,
        *,
        size: float = 1.0,
        dtype: torch.dtype = torch.float32,
        bias: bool = False,
        scale: float = 1.0,
        cap: float | None = None,
    ) -> None:
        theirs = teacher_ids or ids
        self.shared = min(ids, theirs)
        make = partial(torch.randn, dtype=dtype)
        self.hidden = (make(targets, 8) * size).requires_grad_()
        self.weight = make(ids, 8).requires_grad_()
        self.bias = make(ids).requires_grad_() if bias else None
        finish = LogitTransform(scale, cap)
        self.head = LinearHead(self.weight, self.bias, finish)
        self.teacher = Hidden(make(targets, 12) * size, LinearHead(make(theirs, 12), None, finish))
        self.labels = torch.randint(0, self.shared, (targets,))

    @property
    def inputs(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def fused(
        self, weights: Weights, scale: float = 0.25, memory_mb: float = 160, signal: Any = ...
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return fused_loss(
            self.hidden,
            self.head,
            self.labels,
            self.teacher if signal is ... else signal,
            weights,
            scale=torch.tensor(scale, dtype=torch.float64),
            memory_mb=memory_mb,
        )

    def plain(self, weights: Weights, scale: float = 0.25) -> tuple[Tensor, Tensor, Tensor]:
        """Whole logits, autograd; the loss, CE and divergence of each target."""
        z = F.linear(self.hidden, self.weight, self.bias) * self.head.transform.scale
        if (cap := self.head.transform.cap) is not None:
            z = cap * torch.tanh(z / cap)
        w, n, temperature = self.teacher.logits.to(z.dtype), self.shared, weights.temperature
        ce = F.cross_entropy(z, self.labels, reduction="none")
        log_q = F.log_softmax(z[:, :n] / temperature, -1)
        divergence = weights.function(log_q, F.log_softmax(w[:, :n] / temperature, -1))
        each = weights.ce * ce + weights.divergence * temperature**2 * divergence
        return each.sum() * scale, ce, divergence


def weigh(function: Any, alpha: float = 0.5, temperature: float = 1.0, shared: int = 37) -> Weights:
    return Weights(1 - alpha, alpha, temperature, function, shared)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "BLOCK_BYTES", 3 * 37 * 4)  # three rows of 37 ids


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: getattr(f, "func", f).__name__)
def test_fused_is_plain(function: Any, alpha: float, temperature: float, end: str) -> None:
    batch = Batch(**ENDS[end])
    weights = weigh(function, alpha, temperature)
    expected, ce, divergence = batch.plain(weights)
    loss, values = batch.fused(weights, memory_mb=5 * 2 * 37 * 4 / 2**20)  # chunks of 4, 4, 3
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(values["ce"], ce.detach())
    torch.testing.assert_close(values["divergence"], divergence.detach(), rtol=1e-4, atol=1e-6)
    slopes = torch.autograd.grad(3 * expected, batch.inputs)
    for found, slope in zip(torch.autograd.grad(3 * loss, batch.inputs), slopes, strict=True):
        torch.testing.assert_close(found, slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("ids", "teacher_ids"), [(37, 41), (41, 37)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_padded_vocabularies_in_float64(ids: int, teacher_ids: int, temperature: float) -> None:
    for function in FUNCTIONS:
        batch = Batch(ids=ids, teacher_ids=teacher_ids, dtype=torch.float64)
        weights = weigh(function, 0.7, temperature)
        loss, expected = batch.fused(weights)[0], batch.plain(weights)[0]
        torch.testing.assert_close(loss, expected)
        slopes = torch.autograd.grad(expected, batch.inputs)
        torch.testing.assert_close(torch.autograd.grad(loss, batch.inputs), slopes)


@settings(max_examples=60, deadline=None)
@given(
    targets=st.integers(0, 17),
    ids=st.integers(2, 40),
    padding=st.integers(-5, 5),
    chunk=st.one_of(st.just(1), st.integers(2, 40)),
    block=st.integers(1, 20),
    size=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    number=st.integers(0, len(FUNCTIONS) - 1),
    seed=st.integers(0, 2**20),
)
def test_any_shape_any_chunk_any_size(
    targets: int,
    ids: int,
    padding: int,
    chunk: int,
    block: int,
    size: float,
    temperature: float,
    number: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    teacher_ids = max(2, ids + padding)
    batch = Batch(targets, ids, teacher_ids, size=size)
    weights = weigh(FUNCTIONS[number], 0.5, temperature, batch.shared)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "BLOCK_BYTES", block * ids * 4)
        loss, values = batch.fused(weights, memory_mb=chunk * (ids + teacher_ids) * 4 / 2**20)
    gradients = torch.autograd.grad(loss, batch.inputs)
    assert loss.isfinite()
    for value in (*values.values(), *gradients):
        assert value.isfinite().all()
    assert (values["divergence"] >= -1e-6).all()
    assert all(len(value) == targets for value in values.values())
    if targets == 0:
        assert loss == 0
        assert all((gradient == 0).all() for gradient in gradients)
    elif size <= 1:
        expected = batch.plain(weights)[0]
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        slopes = torch.autograd.grad(expected, batch.inputs)
        torch.testing.assert_close(gradients, slopes, rtol=1e-3, atol=1e-4)


def test_bfloat16_is_no_further_from_the_truth_than_autocast() -> None:
    for function in FUNCTIONS:
        batch = Batch(64, 400)
        weights = weigh(function, 0.5, 2.0, 400)
        exact = Batch(64, 400, dtype=torch.float64)
        for name in ("hidden", "weight"):
            value = getattr(batch, name).detach().double().requires_grad_()
            setattr(exact, name, value)
        states, theirs = batch.teacher.states, batch.teacher.head.weight
        exact.teacher = Hidden(states.double(), LinearHead(theirs.double()))
        exact.labels = batch.labels
        truth = torch.autograd.grad(exact.plain(weights)[0], exact.inputs)
        batch.teacher = Hidden(states.bfloat16(), LinearHead(theirs))
        with torch.autocast("cpu", torch.bfloat16):
            fused = torch.autograd.grad(batch.fused(weights)[0], batch.inputs)
            z = F.linear(batch.hidden, batch.weight)  # bf16, as Hugging Face has it
        log_q = F.log_softmax(z.float() / 2, -1)
        log_p = F.log_softmax(batch.teacher.logits / 2, -1)
        ce = F.cross_entropy(z.float(), batch.labels, reduction="none")
        plain = (0.5 * ce + 0.5 * 4 * function(log_q, log_p)).sum() * 0.25
        plain_slopes = torch.autograd.grad(plain, batch.inputs)
        for ours, usual, right in zip(fused, plain_slopes, truth, strict=True):
            assert ours.dtype == torch.float32
            error, usual_error = ((t.double() - right).norm() for t in (ours, usual))
            assert error <= 1.05 * usual_error
            assert error < 0.05 * right.norm()


def test_float16_keeps_small_gradients() -> None:
    """1 / N of a large step, folded into stored float16 gradients, would round them to zero."""
    batch = Batch(16, 300)
    weights = weigh(divergences.forward_kl, 0.5, 1.0, 300)
    truth = torch.autograd.grad(batch.plain(weights, 1e-6)[0], batch.inputs)
    with torch.autocast("cpu", torch.float16):
        loss = batch.fused(weights, 1e-6)[0]
    for found, right in zip(torch.autograd.grad(loss, batch.inputs), truth, strict=True):
        assert (found - right).norm() < 0.01 * right.norm()


def test_float16_sums_do_not_overflow() -> None:
    """An outlier dimension of the hidden states and a frequent label: the sum over targets passes
    the range of float16 before any loss scale could help."""
    batch = Batch(4096, 300)
    with torch.no_grad():
        batch.hidden[:, 0] = 20.0
        batch.labels[:410] = 7
    weights = weigh(divergences.forward_kl, 0.5, 1.0, 300)
    truth = torch.autograd.grad(batch.plain(weights, 1 / 4096)[0], batch.inputs)
    with torch.autocast("cpu", torch.float16):
        loss = batch.fused(weights, 1 / 4096)[0]
    for found, right in zip(torch.autograd.grad(65536 * loss, batch.inputs), truth, strict=True):
        assert found.isfinite().all()
        assert (found / 65536 - right).norm() < 0.02 * right.norm()


# ---- Only what is needed ----


def test_a_second_backward_is_refused() -> None:
    batch = Batch()
    loss, _ = batch.fused(weigh(divergences.forward_kl))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward through the fused head"):
        loss.backward()


def test_a_frozen_head_gets_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the product for the head's gradient was made")

    monkeypatch.setattr(head, "_add_product_", never)
    batch = Batch()
    expected = torch.autograd.grad(batch.plain(weigh(divergences.jsd))[0], batch.hidden)
    batch.weight.requires_grad_(False)
    loss, _ = batch.fused(weigh(divergences.jsd))
    found = torch.autograd.grad(loss, batch.hidden)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grad", [True, False])
def test_products_that_are_made(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four with a live teacher and a gradient, two in evaluation."""
    made = []
    for name in ("mm", "addmm"):
        real = getattr(torch, name)

        def counting(*args: Any, real: Any = real, **kwargs: Any) -> Any:
            made.append(real.__name__)
            return real(*args, **kwargs)

        monkeypatch.setattr(torch, name, counting)
    batch = Batch()
    with nullcontext() if grad else torch.no_grad():
        _, values = batch.fused(weigh(divergences.forward_kl))
    assert len(made) == (4 if grad else 2)
    assert ("teacher_ce" in values) is not grad


def test_no_whole_logits() -> None:
    """What is held at a time does not grow with the number of targets."""
    largest = []
    for targets in (64, 256):
        shapes = []

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(
                self,
                op: Any,
                types: Any,
                args: Any = (),
                kwargs: Any = None,
                shapes: list[int] = shapes,
            ) -> Any:
                out = op(*args, **(kwargs or {}))
                if isinstance(out, Tensor) and out.dim() == 2 and out.shape[1] == 500:
                    shapes.append(len(out))
                return out

        batch = Batch(targets, 500)
        with Watch():
            batch.fused(weigh(divergences.forward_kl, shared=500), memory_mb=16 * 1000 * 4 / 2**20)
        largest.append(max(shapes))
    assert largest == [16, 16]


def test_evaluation_tells_what_the_teacher_does() -> None:
    batch = Batch(ids=37, teacher_ids=41)
    with torch.no_grad():
        _, values = batch.fused(weigh(divergences.forward_kl, temperature=2.0))
        z, w = F.linear(batch.hidden, batch.weight), batch.teacher.logits
    torch.testing.assert_close(
        values["teacher_ce"], F.cross_entropy(w, batch.labels, reduction="none")
    )
    agree = (z.argmax(-1) == w[:, :37].argmax(-1)).float()
    assert torch.equal(values["top1_agreement"], agree)


# ---- Teachers that are not live ----


def test_handed_over_logits_are_the_same() -> None:
    batch = Batch(cap=4.0)
    weights = weigh(divergences.reverse_kl, temperature=2.0)
    as_logits, as_hidden = (
        batch.fused(weights, signal=signal)[0]
        for signal in (Logits(batch.teacher.logits), batch.teacher)
    )
    torch.testing.assert_close(as_logits, as_hidden)
    torch.testing.assert_close(
        torch.autograd.grad(as_logits, batch.inputs), torch.autograd.grad(as_hidden, batch.inputs)
    )


def sparse_of(logits: Tensor, temperature: float, unused: bool) -> TopK:
    """The three most likely ids of each row, in half of the rows only two."""
    p = F.softmax(logits.double() / temperature, -1)
    top = p.topk(3)
    ids, probs = top.indices, top.values
    if unused:
        ids[::2, 2], probs[::2, 2] = -1, 0.0
    tail = 1 - probs.sum(-1)
    return TopK(ids, probs.log().to(logits.dtype), tail.log().to(logits.dtype))


def sparse_truth(batch: Batch, sparse: TopK, weights: Weights, name: str) -> Tensor:
    """In probability space, target by target."""
    total = torch.zeros(()).double()
    for t in range(len(batch.labels)):
        z = batch.hidden[t].double() @ batch.weight.double().T
        total = total - weights.ce * F.log_softmax(z, -1)[batch.labels[t]]
        q = oracle.probabilities(z[: weights.shared], weights.temperature)
        ids = [i for i in sparse.ids[t].tolist() if i >= 0]
        rest = [i for i in range(weights.shared) if i not in ids]
        ours = torch.cat([q[ids], q[rest].sum()[None]])
        p = sparse.log_probs[t].double().exp()[: len(ids)]
        theirs = torch.cat([p, sparse.log_tail[t].double().exp()[None]])
        value = oracle.divergence(name, ours, theirs)
        total = total + weights.divergence * weights.temperature**2 * value
    return total * 0.25


ORACLE = {"jsd": partial(divergences.jsd, beta=oracle.BETA)} | {
    name: partial(getattr(divergences, name), skew=oracle.SKEW)
    for name in ("skew_forward_kl", "skew_reverse_kl")
}


def named_functions() -> Iterator[tuple[str, Any]]:
    for name, function in divergences.DIVERGENCES.items():
        yield name, ORACLE.get(name, function)
    yield "squared_hellinger", oracle.squared_hellinger


@pytest.mark.parametrize(("name", "function"), list(named_functions()))
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("unused", [False, True])
def test_a_sparse_teacher(name: str, function: Any, temperature: float, unused: bool) -> None:
    batch = Batch(5, 19, 15)
    weights = weigh(function, 0.6, temperature, 15)
    sparse = sparse_of(batch.teacher.logits, temperature, unused)
    truth = sparse_truth(batch, sparse, weights, name)
    loss, values = batch.fused(weights, signal=sparse, memory_mb=2 * 19 * 4 / 2**20)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    slopes = torch.autograd.grad(truth, batch.inputs)
    found = torch.autograd.grad(loss, batch.inputs)
    torch.testing.assert_close(found, slopes, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        _, evaluated = batch.fused(weights, signal=sparse)
    torch.testing.assert_close(evaluated["divergence"], values["divergence"])


def test_a_sparse_teacher_without_a_tail_left() -> None:
    """All of the student's mass on the named ids: nothing to share, no NaN."""
    logits = torch.tensor([[1e4, 0.0, -1e4, -1e4]])
    teacher = TopK(torch.tensor([[0, 1]]), torch.tensor([[-0.1, -3.0]]), torch.tensor([-3.5]))
    for function in FUNCTIONS:
        values, gradient = kernel.value_and_gradient(
            logits.clone(), torch.tensor([0]), teacher, weigh(function, shared=4)
        )
        assert gradient.isfinite().all()
        assert values["divergence"].isfinite().all()


def test_signals_are_what_they_say() -> None:
    for signal in (Logits(torch.zeros(4, 3)), Batch(4).teacher):
        part: Signal = signal[1:3]
        assert len(part.logits) == 2
