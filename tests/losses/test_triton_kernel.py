"""The Triton kernels against autograd in float64, on CPU tensors in Triton's interpreter.

On a machine with a CUDA device the same tests run the compiled kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from test_closed_forms import DIVERGENCES
from torch import Tensor
from torch.nn import functional as F

from hf_distill.losses import fused_head
from hf_distill.losses.divergences import tvd
from hf_distill.losses.fused_head import fused_loss
from hf_distill.losses.kernels.torch import outcomes
from hf_distill.losses.linear_head import LinearHead, LogitTransform
from hf_distill.losses.signals import Hidden, Logits, Sampled, TopK
from hf_distill.losses.weights import Weights

pytest.importorskip("triton", reason="Triton is not installed: pip install 'hf-distill[kernels]'")

from hf_distill.losses.kernels.triton import TritonKernel

# The interpreter works with NumPy, which tells of -inf - -inf and of log(0); a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Half a unit in the last place; the interpreter truncates to bfloat16 instead of rounding.
ROUNDING = 0.51 if torch.cuda.is_available() else 1.01
CAPPED = LogitTransform(1.3, 4.0)
SHAPES = [(False, True), (True, False)]  # padded rows, weights for each target
PLAIN = LogitTransform()
NAMES = [getattr(function, "func", function).__name__ for function in DIVERGENCES]


class Rows:
    """Some rows of products with what the kernel is given beside them.

    padded: ids of the student that no token has, beyond those both models share; and memory
        beyond the end of a row
    """

    def __init__(self, ids: int, *, dtype: torch.dtype, rows: int = 3, padded: bool = False):
        more = 70 if padded else 0
        memory = torch.randn(rows, ids + more + (5 if padded else 0)) * 3
        self.memory = memory.to(DEVICE, dtype)
        self.logits = self.memory[:, : ids + more]
        theirs = ids + (more // 2 if rows == 1 else 2 * more)
        self.teacher = (torch.randn(rows, theirs) * 3).to(DEVICE, dtype)
        self.labels = torch.randint(0, ids, (rows,), device=DEVICE)
        self.shared = ids

    def weights(self, function: Any, temperature: float = 1.0, for_each: bool = False) -> Weights:
        weights = Weights(0.3, 0.7, temperature, function, self.shared)
        if for_each:
            each = torch.rand(len(self.labels), 1, device=DEVICE)
            each[0] = 0.0
            weights = replace(weights, ce=each, divergence=1.5 - each)
        return weights


def expected(
    rows: Rows,
    teacher: Logits | TopK | Sampled | None,
    weights: Weights,
    transform: LogitTransform = PLAIN,
    teacher_transform: LogitTransform = PLAIN,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Values, and by autograd the gradient by the products, all in float64.

    The last tensor is true where the gradient jumps: TVD's is the sign of q - p, and float32
    cannot tell it where both are almost equal.
    """
    products = rows.logits.double().requires_grad_()
    z, shared, temperature = finish(products, transform), weights.shared, weights.temperature
    values = {"ce": F.cross_entropy(z, rows.labels, reduction="none")}
    jumps = torch.zeros_like(products, dtype=torch.bool)
    each = weights.ce * values["ce"][:, None]
    if teacher is not None:
        log_q = F.log_softmax(z[:, :shared] / temperature, -1)
        if isinstance(teacher, Logits):
            t = finish(teacher.logits.double(), teacher_transform)
            log_p = F.log_softmax(t[:, :shared] / temperature, -1)
            values["divergence"] = weights.function(log_q, log_p)
            if weights.function is tvd:
                jumps[:, :shared] = (log_q - log_p).abs() < 1e-5
            values["teacher_ce"] = F.cross_entropy(t, rows.labels, reduction="none")
            same = z[:, :shared].argmax(-1) == t[:, :shared].argmax(-1)
            values["top1_agreement"] = same.double()
        elif isinstance(teacher, Sampled):
            drawn = log_q.gather(1, teacher.slots)
            values["divergence"] = -teacher.entropy - (teacher.weights * drawn).sum(-1)
        else:
            values["divergence"] = weights.function(*outcomes(log_q, teacher))
        each = each + weights.divergence * temperature**2 * values["divergence"][:, None]
    each.sum().backward()
    assert products.grad is not None
    return {name: value.detach() for name, value in values.items()}, products.grad, jumps


def finish(products: Tensor, transform: LogitTransform) -> Tensor:
    z = products * transform.scale
    return z if transform.cap is None else transform.cap * torch.tanh(z / transform.cap)


def compare(
    rows: Rows,
    teacher: Logits | TopK | Sampled | None,
    weights: Weights,
    transform: LogitTransform = PLAIN,
    teacher_transform: LogitTransform = PLAIN,
) -> None:
    """Run the kernel, with and without gradient, and compare both with float64."""
    values, gradient, jumps = expected(rows, teacher, weights, transform, teacher_transform)
    ends = {"transform": transform, "teacher_transform": teacher_transform}
    beyond = rows.memory[:, rows.logits.shape[1] :].clone()

    scratch = rows.memory.clone()[:, : rows.logits.shape[1]]
    found = TritonKernel()(scratch, rows.labels, teacher, weights, gradient=False, **ends)
    assert set(found) == set(values)
    for name, value in values.items():
        close(found[name], value)

    factor = 256.0 if rows.logits.dtype == torch.float16 else 1.0
    found = TritonKernel()(
        rows.logits, rows.labels, teacher, weights, gradient=True, factor=factor, **ends
    )
    for name in found:
        close(found[name], values[name])
    # Arithmetic in float32, then one rounding to the dtype of the logits.
    rounding = torch.finfo(rows.logits.dtype).eps * ROUNDING
    error = (rows.logits.double() / factor - gradient).abs()
    wrong = error > gradient.abs() * rounding + 2e-6
    assert not (wrong & ~jumps).any()
    assert torch.equal(rows.memory[:, rows.logits.shape[1] :], beyond)


def close(found: Tensor, value: Tensor) -> None:
    torch.testing.assert_close(found.double(), value, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("ids", [2, 257, 1000, 50257])
@pytest.mark.parametrize("function", DIVERGENCES, ids=NAMES)
def test_a_teachers_logits(function: Any, ids: int, dtype: torch.dtype) -> None:
    shapes = SHAPES if ids == 50257 else product((False, True), repeat=2)
    for temperature, (padded, for_each) in product((1.0, 2.0), shapes):
        rows = Rows(ids, dtype=dtype, padded=padded, rows=2 if for_each else 1)
        weights = rows.weights(function, temperature, for_each)
        compare(rows, Logits(rows.teacher), weights)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("function", DIVERGENCES, ids=NAMES)
def test_scale_and_soft_capping(function: Any, temperature: float) -> None:
    for transform, theirs in ((LogitTransform(0.3), PLAIN), (PLAIN, CAPPED), (CAPPED, CAPPED)):
        rows = Rows(2500, dtype=torch.float32, padded=True)
        compare(rows, Logits(rows.teacher), rows.weights(function, temperature), transform, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("function", DIVERGENCES, ids=NAMES)
def test_recorded_ids_with_a_tail(function: Any, dtype: torch.dtype) -> None:
    for ids, temperature, (padded, for_each) in product((5, 2500), (1.0, 2.0), SHAPES):
        rows = Rows(ids, dtype=dtype, padded=padded, rows=2)
        weights = rows.weights(function, temperature, for_each)
        compare(rows, top_k(rows, 3, temperature), weights, CAPPED if for_each else PLAIN)


def test_recorded_ids_that_are_all_there_are() -> None:
    """The student's tail then is empty, and the recorded one stands for it."""
    rows = Rows(4, dtype=torch.float32)
    compare(rows, top_k(rows, 4, 1.0), rows.weights(DIVERGENCES[0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_draws(dtype: torch.dtype) -> None:
    for ids, temperature, (padded, for_each) in product((5, 2500), (1.0, 2.0), SHAPES):
        rows = Rows(ids, dtype=dtype, padded=padded, rows=2)
        weights = rows.weights(DIVERGENCES[0], temperature, for_each)
        compare(rows, draws(rows), weights, CAPPED if for_each else PLAIN)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_no_teacher(dtype: torch.dtype) -> None:
    for ids, transform, for_each in product((2, 2500), (PLAIN, CAPPED), (False, True)):
        rows = Rows(ids, dtype=dtype, padded=True)
        compare(rows, None, rows.weights(DIVERGENCES[0], 2.0, for_each), transform)


@pytest.mark.parametrize("size", [1e-3, 30.0, 300.0])
@pytest.mark.parametrize("function", DIVERGENCES, ids=NAMES)
def test_flat_and_certain_distributions(function: Any, size: float) -> None:
    """Neither overflow nor NaN, and probabilities that underflow."""
    rows = Rows(2500, dtype=torch.float32)
    rows.logits.mul_(size / 3)
    rows.teacher.mul_(size / 3)
    weights = rows.weights(function)
    values, gradient, jumps = expected(rows, Logits(rows.teacher), weights)
    found = TritonKernel()(
        rows.logits, rows.labels, Logits(rows.teacher), weights,
        transform=PLAIN, teacher_transform=PLAIN, gradient=True,
    )  # fmt: skip
    for name in found:
        torch.testing.assert_close(found[name].double(), values[name], rtol=2e-5, atol=2e-5)
    found_gradient = torch.where(jumps, gradient, rows.logits.double())
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("signal", ["logits", "top-k", "draws", "none"])
def test_the_fused_head_with_this_kernel(
    signal: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, values and the gradients of hidden states and head are those of the PyTorch kernel."""
    hidden, weight = torch.randn(70, 16), torch.randn(301, 16) / 2
    teacher = Hidden(torch.randn(70, 8).to(dtype), LinearHead(torch.randn(307, 8).to(dtype)))
    labels = torch.randint(0, 300, (70,))
    rows = Rows(300, dtype=torch.float32, rows=70)
    given = {"logits": teacher, "top-k": top_k(rows, 5, 2.0), "draws": draws(rows), "none": None}
    weights = Weights(0.4, 0.6, 2.0, DIVERGENCES[0], 300)

    def run() -> list[Tensor]:
        inputs = [hidden.to(DEVICE, dtype).requires_grad_(), weight.to(DEVICE, dtype)]
        inputs[1].requires_grad_()
        with torch.random.fork_rng():
            loss, values = fused_loss(
                inputs[0], LinearHead(inputs[1]), labels.to(DEVICE), given[signal], weights,
                scale=torch.tensor(1 / 70, dtype=torch.float64), memory_mb=0.05,
            )  # fmt: skip
        loss.backward()
        return [loss, *values.values(), *(tensor.grad for tensor in inputs)]  # type: ignore[misc]

    plain = run()
    monkeypatch.setattr(fused_head, "kernel_for", lambda *_: TritonKernel())
    eps = torch.finfo(dtype).eps
    for one, other in zip(run(), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=4 * eps + 1e-5, atol=eps / 30 + 1e-6)


def top_k(rows: Rows, k: int, temperature: float) -> TopK:
    """The teacher's k likeliest ids; the last row has two unused slots."""
    log_p = F.log_softmax(rows.teacher[:, : rows.shared].float() / temperature, -1)
    log_probs, ids = log_p.topk(k)
    ids[-1, -2:] = -1
    named = torch.where(ids >= 0, log_probs, -torch.inf)
    rest = (1 - named.exp().sum(-1)).clamp(min=1e-6)
    return TopK(ids, torch.where(ids >= 0, log_probs, -80.0), rest.log())


def draws(rows: Rows, number: int = 8) -> Sampled:
    """Counts of the ids drawn, over their number."""
    log_p = F.log_softmax(rows.teacher[:, : rows.shared].float(), -1)
    ids = torch.full((len(log_p), number), -1, device=DEVICE)
    weights = torch.zeros(len(log_p), number, device=DEVICE)
    for row, drawn in enumerate(log_p.exp().multinomial(number, replacement=True)):
        own, counts = drawn.unique(return_counts=True)
        ids[row, : len(own)], weights[row, : len(own)] = own, counts / number
    return Sampled(ids, weights, -(log_p.exp() * log_p).sum(-1))


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--quick"], []])
def test_variants_compile_with_few_registers(options: list[str]) -> None:
    """The static rows of the benchmarks, for three generations of GPUs."""
    root = Path(__file__).resolve().parents[2]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(root / "benchmarks" / "kernel_static.py"), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["arch"] for row in rows} == {80, 90, 100}
    for row in rows:
        assert row["launches_per_chunk"] == 1, row
        assert row["spills"] <= 32, row  # bytes of a thread
        # 128: two programs a multiprocessor and more. Evaluation keeps more running values.
        assert row["registers"] <= (168 if "gradient False" in row["variant"] else 128), row
    bytes_moved = {row["variant"]: row["bytes_per_logit"] for row in rows}
    assert bytes_moved["logits, forward_kl, bfloat16, T 1"] == 10
    assert bytes_moved["logits, jsd, bfloat16, T 1"] == 14  # a third pass
    assert bytes_moved["top-k, forward_kl, bfloat16, T 1"] == 6
