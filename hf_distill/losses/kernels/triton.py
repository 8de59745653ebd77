"""Value and gradient of the objective for a chunk of targets, as Triton kernels.

They compute what `kernels.torch` computes, in one launch a chunk and in float32, and keep no array
beside the logits. `triton_dense` has the kernel for a teacher's logits, `triton_sparse` the one for
recordings, and each the expression that it equals.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from hf_distill.losses.divergences import built_in
from hf_distill.losses.kernels.triton_dense import dense_kernel
from hf_distill.losses.kernels.triton_sparse import sparse_kernel
from hf_distill.losses.linear_head import LogitTransform
from hf_distill.losses.signals import Logits, Sampled, TopK
from hf_distill.losses.weights import Weights

# Eight bfloat16 values a thread, one wide load.
BLOCK = 2048
WARPS = 8
# tl.arange takes powers of two, and a block is at least this.
LEAST_BLOCK = 16


class TritonKernel:
    """The kernel of the fused head on CUDA, for the divergences that `triton_parts` knows."""

    extra_bytes = 0

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        teacher: Logits | TopK | Sampled | None,
        weights: Weights,
        *,
        transform: LogitTransform,
        teacher_transform: LogitTransform,
        gradient: bool,
        factor: float = 1.0,
    ) -> Mapping[str, Tensor]:
        """See `kernels.interface.Kernel`."""
        rows, ids = logits.shape
        names = ["ce"] if teacher is None else ["ce", "divergence"]
        if isinstance(teacher, Logits) and not gradient:
            names += ["teacher_ce", "top1_agreement"]
        values = logits.new_empty((4, rows), dtype=torch.float32)
        if rows:
            name, parameter = built_in(weights.function) or ("", 0.0)
            shared = ids if teacher is None else weights.shared
            arguments = {
                "student": logits,
                "labels": labels,
                "values": values,
                "rows": rows,
                "student_stride": logits.stride(0),
                "ids": ids,
                "shared": shared,
                "temperature": float(weights.temperature),
                "parameter": float(parameter),
                "factor": float(factor),
                "DIVERGENCE": "none" if teacher is None else name,
                "ALIKE": teacher is not None and weights.temperature == 1.0 and shared == ids,
                "GRADIENT": gradient,
                "BLOCK": _power_of_two(ids, most=BLOCK),
                "num_warps": WARPS,
                "enable_fp_fusion": True,  # products and sums in one instruction
                **_weight("ce", weights.ce),
                **_weight("divergence", weights.divergence),
                **_end("", transform),
            }
            if isinstance(teacher, TopK | Sampled):
                sparse_kernel[(rows,)](**arguments, **_recorded(teacher))
            else:
                theirs = logits if teacher is None else _side_by_side(teacher.logits)
                dense_kernel[(rows,)](
                    **arguments,
                    teacher=theirs,
                    teacher_stride=theirs.stride(0),
                    teacher_ids=theirs.shape[1],
                    **_end("teacher_", teacher_transform),
                )
        return dict(zip(names, values, strict=False))


def _recorded(teacher: TopK | Sampled) -> dict[str, Any]:
    drawn = isinstance(teacher, Sampled)
    named = teacher.weights if isinstance(teacher, Sampled) else teacher.log_probs
    rest = teacher.entropy if isinstance(teacher, Sampled) else teacher.log_tail
    width = teacher.ids.shape[1]
    return {
        "named_ids": teacher.ids.contiguous(),
        "named": named.contiguous(),
        "rest": rest.contiguous(),
        "width": width,
        "DRAWN": drawn,
        "WIDTH": _power_of_two(width),
    }


def _weight(name: str, weight: float | Tensor) -> dict[str, Any]:
    """A number, or a pointer to one for each target."""
    if isinstance(weight, Tensor):
        return {f"{name}_weights": weight.contiguous(), f"{name}_weight": 0.0}
    return {f"{name}_weights": None, f"{name}_weight": float(weight)}


def _end(prefix: str, transform: LogitTransform) -> dict[str, Any]:
    return {
        f"{prefix}scale": float(transform.scale),
        f"{prefix}cap": float(transform.cap or 1.0),
        f"{prefix}capped".upper(): transform.cap is not None,
    }


def _side_by_side(logits: Tensor) -> Tensor:
    """Logits with the ids of a row next to each other in memory."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _power_of_two(number: int, most: int | None = None) -> int:
    power = max(LEAST_BLOCK, triton.next_power_of_2(number))
    return power if most is None else min(most, power)
