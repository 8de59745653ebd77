"""The device of the GPU tests.

With HF_DISTILL_GPU_DRY=1 they run on the CPU at tiny sizes (`bash benchmarks/gpu.sh --dry`), to see
that they work as Python. Triton then has to run in its interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import os

import pytest
import torch
from packaging.version import Version

from hf_distill.losses.kernels.interface import Kernel


@pytest.fixture(scope="session")
def dry() -> bool:
    """Whether the tests run on the CPU, at tiny sizes."""
    return os.environ.get("HF_DISTILL_GPU_DRY") == "1"


@pytest.fixture(scope="session")
def device(dry: bool) -> torch.device:
    """The device to test on; skips where there is none."""
    if dry:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device; HF_DISTILL_GPU_DRY=1 runs the GPU tests on the CPU")
    return torch.device("cuda")


@pytest.fixture
def triton_kernel(device: torch.device, dry: bool) -> Kernel:
    """The kernel under test; skips without Triton."""
    triton = pytest.importorskip("triton")
    if dry and Version(triton.__version__) < Version("3.9"):
        pytest.skip(f"the interpreter of Triton {triton.__version__} does not run these kernels")
    from hf_distill.losses.kernels.triton import TritonKernel

    return TritonKernel()
