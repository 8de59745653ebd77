"""Choose the kernel of the fused head."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from hf_distill.losses.divergences import Divergence, built_in
from hf_distill.losses.kernels.interface import Kernel
from hf_distill.losses.kernels.torch import TorchKernel


def kernel_for(wide: torch.dtype, device: torch.device, divergence: Divergence) -> Kernel:
    """The Triton kernel on CUDA for the divergences that it knows, else the PyTorch kernel.

    wide: the dtype of the arithmetic; float64 is left to PyTorch
    The environment variable HF_DISTILL_KERNEL=torch turns the Triton kernel off.
    """
    name, _ = built_in(divergence) or (None, 0.0)
    if (
        device.type == "cuda"
        and wide == torch.float32
        and name is not None
        and os.environ.get("HF_DISTILL_KERNEL") != "torch"
        and find_spec("triton") is not None
    ):
        # It comes with PyTorch on CUDA, and is imported only where it is used.
        from hf_distill.losses.kernels.triton import TritonKernel
        from hf_distill.losses.kernels.triton_parts import KNOWN_DIVERGENCES

        if name in KNOWN_DIVERGENCES:
            return TritonKernel()
    return TorchKernel(wide, device)
