"""Which kernel the fused head takes, and that the Triton kernel refuses what it does not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import pytest
import torch

from hf_distill.losses import divergences
from hf_distill.losses.divergences import named_divergence
from hf_distill.losses.kernels import kernel_for

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402 - after the check that it is there
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, CompilationError  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402

from hf_distill.losses.kernels.triton_parts import (  # noqa: E402
    KNOWN_DIVERGENCES,
    value_and_slope,
)

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def chosen(wide: torch.dtype, device: torch.device, divergence: Any) -> str:
    return type(kernel_for(wide, device, divergence)).__name__


def test_triton_on_cuda_for_what_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_DISTILL_KERNEL", raising=False)
    for name in KNOWN_DIVERGENCES:
        assert chosen(torch.float32, CUDA, named_divergence(name)) == "TritonKernel"
    monkeypatch.setitem(divergences.DIVERGENCES, "hellinger", oracle.squared_hellinger)
    for wide, device, divergence in (
        (torch.float32, CUDA, named_divergence("hellinger")),  # built in, without a branch there
        (torch.float32, CUDA, lambda student, teacher: (student - teacher).sum(-1)),
        (torch.float64, CUDA, divergences.tvd),
        (torch.float32, CPU, divergences.tvd),
    ):
        assert chosen(wide, device, divergence) == "TorchKernel"
    monkeypatch.setenv("HF_DISTILL_KERNEL", "torch")
    assert chosen(torch.float32, CUDA, divergences.tvd) == "TorchKernel"


@triton.jit
def _one_id(values, DIVERGENCE: tl.constexpr):  # type: ignore[no-untyped-def]
    v, s = value_and_slope(tl.load(values), tl.load(values + 1), 0.5, DIVERGENCE)
    tl.store(values, v + s)


def evaluate(name: str) -> None:
    """Run the function in Triton's interpreter if that is on, otherwise compile it for a GPU."""
    if triton.knobs.runtime.interpret:
        values = torch.tensor([-1.0, -2.0])
        _one_id[(1,)](values, name)
        assert values.isfinite().all()
        return
    signature = {"values": "*fp32", "DIVERGENCE": "constexpr"}
    source = ASTSource(_one_id, signature, constexprs={"DIVERGENCE": name})
    assert "ptx" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
def test_an_unknown_divergence_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name in sorted(KNOWN_DIVERGENCES):
        evaluate(name)
    with pytest.raises((CompilationError, InterpreterError)) as raised:
        evaluate("hellinger")
    assert "no branch for this divergence" in str(raised.value.__cause__)
