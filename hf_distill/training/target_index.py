"""The index of a batch's targets: made on the CPU by the collator, used on the device.

The number of targets decides the shape of nearly all later tensors. If it were found on an
accelerator, the host would wait in every micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_distill.tasks import TARGET_INDEX, Task


@dataclass(frozen=True)
class TargetIndex:
    """The entry `TARGET_INDEX` of a batch, on its way from the collator to the trainer.

    places: (targets,) int64, see `Task.target_index`
    It is not a tensor, since code that cuts or joins batches row by row must leave it alone. It has
    the methods of a tensor with which loaders pin and move entries.
    """

    places: Tensor

    def to(self, device: Any, non_blocking: bool = False) -> TargetIndex:
        """The same on another device."""
        return TargetIndex(self.places.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TargetIndex:
        """The same in page-locked memory."""
        return TargetIndex(self.places.pin_memory())


class StepTargets:
    """The target index of each micro-batch of a step, beside the tensors that it was made from.

    A hook may change a batch between the loader and the loss. So an index is used only with the
    same tensors that it came with, unchanged.
    """

    def __init__(self, task: Task) -> None:
        self._reads = task.reads
        self._known: list[tuple[list[tuple[Tensor | None, int]], Tensor]] = []

    def take(self, batches: Sequence[Any], check: Callable[[Any], Tensor | None]) -> None:
        """Take the index out of each batch of a step, and forget those of the step before.

        check: checks a batch without an index, and returns one. Such a batch has not been through
            the trainer's collator, or was cut since. On an accelerator this waits for the device
        """
        self._known = []
        for batch in batches:
            given = batch.pop(TARGET_INDEX, None)
            index = check(batch) if given is None else given.places
            if index is not None:
                self._known.append((self._seen(batch), index))

    def follow(self, batch: Mapping[str, Any], moved: dict[str, Any]) -> dict[str, Any]:
        """Also find the index of a batch by the same on another device; returns the latter."""
        index = self.find(batch)
        if index is not None and self.find(moved) is None:
            device = next(moved[n].device for n in self._reads if moved.get(n) is not None)
            self._known.append((self._seen(moved), index.to(device, non_blocking=True)))
        return moved

    def find(self, batch: Mapping[str, Any]) -> Tensor | None:
        """The index of a batch; None where it came without, or was changed since."""
        seen = self._seen(batch)
        for known, index in self._known:
            if all(a is b and v == w for (a, v), (b, w) in zip(known, seen, strict=True)):
                return index
        return None

    def _seen(self, batch: Mapping[str, Any]) -> list[tuple[Tensor | None, int]]:
        """The tensors that decide which positions are targets, and how often each was changed."""
        found = (batch.get(name) for name in self._reads)
        return [(t, 0 if t is None else t._version) for t in found]
