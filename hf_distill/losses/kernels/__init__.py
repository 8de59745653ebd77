"""Elementwise work between the matrix products of the fused head, one module a backend.

kernel_for    the kernel for a device, a dtype and a divergence
Kernel        its interface
"""

from hf_distill.losses.kernels.choose import kernel_for
from hf_distill.losses.kernels.interface import Kernel

__all__ = ["Kernel", "kernel_for"]
