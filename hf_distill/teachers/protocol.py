"""What the trainer asks of any teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_distill.losses.fused_head import Signal


@runtime_checkable
class Teacher(Protocol):
    """Turns a batch into a signal. Any object with these members can teach.

    name: an id for logs and model cards; rows: how many ids it predicts
    tokenizer: the teacher's own, where it is known, for the check that the ids mean the same
    An attribute `together`, if it has one and it is True, says that the teacher can only be asked
    by all processes at once (its weights lie in shards).
    """

    name: str
    rows: int
    tokenizer: PreTrainedTokenizerBase | None

    def prepare(self, accelerator: Accelerator, *, student_reads: int) -> None:
        """Take the place that training will find it in (device, shards). Called once.

        student_reads: how many ids the student can read, and batches may therefore hold
        """

    def signal(self, inputs: Mapping[str, Any], targets: Tensor) -> Signal:
        """The teacher's word on the targets.

        inputs: the batch, without labels; targets: (rows, positions) bool
        """
