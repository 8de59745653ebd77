"""The interface of a kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from hf_distill.losses.linear_head import LogitTransform
from hf_distill.losses.signals import Logits, Sampled, TopK
from hf_distill.losses.weights import Weights


class Kernel(Protocol):
    """Value and gradient of the objective for a chunk of targets.

    extra_bytes: scratch memory for one id of one target, where it grows with the chunk
    """

    extra_bytes: int

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
        """Evaluate a chunk.

        logits: (n, ids), the product of the student's head, in memory that may be overwritten.
            With `gradient` they are replaced by the gradient by that product, times `factor`
        labels: (n,) int64
        teacher: the product of its head, (n, at least the shared ids); or a recorded signal
        transform, teacher_transform: from the products to the logits
        returns: `ce` and, with a teacher, `divergence`, (n,) each, in float32 at least. Without
            `gradient` and with a teacher's logits also `teacher_ce`, over all of its ids, and
            `top1_agreement`, 1 where both have the same most likely shared id, else 0
        """
