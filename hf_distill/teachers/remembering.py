"""A teacher that is run once on each batch, for several students on the same batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import xxhash
from accelerate import Accelerator
from torch import Tensor

from hf_distill.losses.signals import Hidden, Logits, Signal
from hf_distill.losses.targets import Targets
from hf_distill.teachers.live import LiveTeacher

MOST_BYTES = 2**30


class RememberingTeacher:
    """Keeps the signals of a live teacher, and returns them where the same batch comes again.

    Over a vocabulary a signal is the inputs of the output head, which are small; whole logits over
    many ids would not be. Nothing is kept beyond `most_bytes`, nor of a teacher in shards.
    """

    def __init__(self, teacher: LiveTeacher, most_bytes: int = MOST_BYTES) -> None:
        self.model, self.name, self.rows = teacher.model, teacher.name, teacher.rows
        self.tokenizer, self.reads = teacher.tokenizer, teacher.reads
        self._teacher, self._left = teacher, float(most_bytes)
        self._signals: dict[str, Signal] = {}

    @property
    def together(self) -> bool:
        """See `Teacher`."""
        return self._teacher.together

    def prepare(self, accelerator: Accelerator, *, student_reads: int) -> None:
        """See `Teacher.prepare`."""
        self._teacher.prepare(accelerator, student_reads=student_reads)

    def signal(self, inputs: Mapping[str, Any], targets: Targets) -> Signal:
        """See `Teacher.signal`."""
        key = _key({**inputs, "targets": targets.index, "labels": targets.labels})
        if key not in self._signals:
            signal = self._teacher.signal(inputs, targets)
            size = _size(signal)
            if self.together or size > self._left:
                return signal
            self._left -= size
            self._signals[key] = signal
        return self._signals[key]


def _key(tensors: Mapping[str, Any]) -> str:
    """A hash of the values of a batch."""
    digest = xxhash.xxh3_128()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(repr((value.dtype, *value.shape)).encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


def _size(signal: Signal) -> float:
    """The bytes of a signal that a live teacher gives; no limit for others."""
    if isinstance(signal, Hidden):
        return signal.states.nbytes
    return signal.logits.nbytes if isinstance(signal, Logits) else math.inf
