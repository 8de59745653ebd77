"""The Triton kernel with a teacher's logits, against the PyTorch kernel and float64."""

from __future__ import annotations

import pytest
import torch
from kernel_case import KernelCase

from hf_distill.losses.divergences import DIVERGENCES
from hf_distill.losses.kernels.interface import Kernel
from hf_distill.losses.kernels.torch import TorchKernel
from hf_distill.losses.linear_head import LogitTransform

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def size(dry: bool, ids: int = 50257) -> dict[str, int]:
    return {"rows": 5, "ids": 83} if dry else {"rows": 67, "ids": ids}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_value_and_gradient(
    name: str,
    temperature: float,
    dtype: torch.dtype,
    triton_kernel: Kernel,
    device: torch.device,
    dry: bool,
) -> None:
    case = KernelCase(device, dtype, name, temperature, **size(dry))
    teacher = case.live()
    found = case.run(triton_kernel, teacher)
    case.check(found, case.truth(teacher))
    case.check(found, case.run(TorchKernel(torch.float32, device), teacher))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_values_of_evaluation(
    name: str, temperature: float, triton_kernel: Kernel, device: torch.device, dry: bool
) -> None:
    case = KernelCase(device, torch.bfloat16, name, temperature, **size(dry))
    teacher = case.live()
    found = case.run(triton_kernel, teacher, gradient=False)
    assert {"teacher_ce", "top1_agreement"} <= found[0].keys()
    case.check(found, case.truth(teacher, gradient=False))


@pytest.mark.parametrize("ids", [2, 1000, 151936])
def test_vocabularies(ids: int, triton_kernel: Kernel, device: torch.device, dry: bool) -> None:
    shape = size(dry, ids) | ({"ids": min(ids, 83)} if dry else {})
    case = KernelCase(device, torch.bfloat16, "forward_kl", 1.0, **shape)
    teacher = case.live()
    case.check(case.run(triton_kernel, teacher), case.truth(teacher))


def test_scale_and_soft_capping(triton_kernel: Kernel, device: torch.device, dry: bool) -> None:
    end = LogitTransform(scale=0.7, cap=5.0)
    case = KernelCase(device, torch.float32, "jsd", 2.0, **size(dry), transform=end)
    teacher = case.live()
    case.check(case.run(triton_kernel, teacher), case.truth(teacher))
