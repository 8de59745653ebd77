"""The interface of a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from hf_distill.losses.signals import Signal
from hf_distill.losses.targets import Targets


@runtime_checkable
class Teacher(Protocol):
    """Turns a batch into a signal. Any object with these members can be a teacher.

    name: an id for logs and model cards; rows: the number of ids that it predicts
    tokenizer: the teacher's own, if it is known, to check that the ids mean the same
    A teacher may have an attribute `together`: True means that all processes have to call `signal`
    at once, because its weights are sharded. It may have an attribute `reads`, the number of ids in
    its embedding: the trainer's collator then refuses rows with other ids.
    """

    name: str
    rows: int
    tokenizer: PreTrainedTokenizerBase | None

    def prepare(self, accelerator: Accelerator, *, student_reads: int) -> None:
        """Move the weights to where training needs them (device, shards). Called once.

        student_reads: the number of ids that batches may hold: those of the student's embedding,
            or fewer where the trainer's collator has refused what this teacher cannot read
        """

    def signal(self, inputs: Mapping[str, Any], targets: Targets) -> Signal:
        """Return the teacher's signal at the target positions.

        inputs: the batch, without labels; targets: `targets.select(logits)` takes the targets out
            of a (rows, positions, ...) tensor, `targets.mask` is (rows, positions) bool
        """
