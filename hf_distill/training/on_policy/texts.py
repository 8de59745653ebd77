"""The student's generated texts: one text, and figures and warnings about many."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash

from hf_distill.data.text_figures import length_and_variety

# The warnings come after this many steps in a row with at least this share of cut texts, or of
# repeated pairs of tokens.
PATIENCE, NEARLY_ALL, OFTEN = 3, 0.9, 0.5


@dataclass(frozen=True, order=True)
class Text:
    """A completion that the student has written.

    step: the optimizer step, from 1, that was made with it
    prompt, completion: ids; finished: whether it ended before the length limit
    """

    step: int
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    finished: bool

    @property
    def prompt_id(self) -> str:
        """The hash of the prompt's ids, as 16 hexadecimal digits."""
        return xxhash.xxh3_64_hexdigest(np.asarray(self.prompt, "<i4").tobytes())


def text_figures(texts: Sequence[Text]) -> dict[str, float]:
    """Length and variety of some texts, by their names in the log, see `length_and_variety`."""
    completions, finished = [t.completion for t in texts], [t.finished for t in texts]
    return length_and_variety(completions, finished)


@dataclass
class Troubles:
    """Detects steps in a row with cut or repetitive texts."""

    _cut: int = 0
    _repeated: int = 0

    def found(self, texts: Sequence[Text], max_new_tokens: int) -> list[str]:
        """The warnings after the texts of one more step; each of them comes once in a row."""
        figures = text_figures(texts)
        cut = figures.get("written_cut", 0.0) >= NEARLY_ALL
        repeated = figures.get("written_repetition", 0.0) >= OFTEN
        self._cut = self._cut + 1 if cut else 0
        self._repeated = self._repeated + 1 if repeated else 0
        found = []
        if self._cut == PATIENCE:
            found.append(
                f"In {PATIENCE} steps in a row, nearly all texts of the student reached "
                f"max_new_tokens={max_new_tokens} without an end: raise it, or check that the "
                "student has learnt to stop."
            )
        if self._repeated == PATIENCE:
            found.append(
                f"In {PATIENCE} steps in a row, at least half of the student's text was "
                "repetition: train it on data rows first, lower on_policy, or raise "
                "sampling_temperature."
            )
        return found


@dataclass
class Stopwatch:
    """Seconds of work by name, also for a device that runs asynchronously.

    device: whose work is timed
    """

    device: torch.device
    _seconds: dict[str, float] = field(default_factory=dict)
    _events: list[tuple[str, Any, Any]] = field(default_factory=list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time of a block."""
        if self.device.type in ("cuda", "xpu"):
            start, end = (torch.Event(self.device, enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
            return
        begin = time.perf_counter()
        yield
        self._add(name, time.perf_counter() - begin)

    def pop(self) -> dict[str, float]:
        """The seconds since the last call. Waits for the device."""
        for name, start, end in self._events:
            end.synchronize()
            self._add(name, start.elapsed_time(end) / 1000)
        found, self._seconds, self._events = self._seconds, {}, []
        return found

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
