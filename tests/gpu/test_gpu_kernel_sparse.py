"""The Triton kernel with recorded teachers, against the PyTorch kernel and float64."""

from __future__ import annotations

import pytest
import torch
from kernel_case import KernelCase

from hf_distill.losses.divergences import DIVERGENCES
from hf_distill.losses.kernels.interface import Kernel
from hf_distill.losses.kernels.torch import TorchKernel

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Draws are an estimate of the forward KL only.
TEACHERS = [("top_k", name) for name in DIVERGENCES] + [("draws", "forward_kl")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("kind", "name"), TEACHERS)
def test_value_and_gradient(
    kind: str,
    name: str,
    temperature: float,
    dtype: torch.dtype,
    triton_kernel: Kernel,
    device: torch.device,
    dry: bool,
) -> None:
    shape = {"rows": 5, "ids": 83} if dry else {"rows": 67, "ids": 50257}
    case = KernelCase(device, dtype, name, temperature, **shape)
    teacher = getattr(case, kind)()
    found = case.run(triton_kernel, teacher)
    case.check(found, case.truth(teacher))
    case.check(found, case.run(TorchKernel(torch.float32, device), teacher))
