"""The student's generated texts: one text, and figures and warnings about many."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
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
NEWEST = 8  # the texts of a log that are kept, and judged in one small forward of both models
DISTINCT = "written_distinct"


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


class Pairs:
    """Counts the different pairs of tokens in texts, at 8 to 16 bytes for each of them."""

    def __init__(self) -> None:
        self._total = 0
        self._seen = np.empty(0, np.int64)
        self._new: list[Any] = []  # of texts since the last merge

    def add(self, texts: Sequence[Text]) -> None:
        """Add the pairs of some texts."""
        ids = [np.asarray(text.completion, np.int64) for text in texts]
        pairs = [one[:-1] << 32 | one[1:] for one in ids]
        self._total += sum(map(len, pairs))
        new = np.unique(np.concatenate([np.empty(0, np.int64), *pairs]))
        self._new += [new] if len(new) else []
        # Merging less and less often costs a few sorts of the final array in all.
        if sum(map(len, self._new)) > len(self._seen):
            self._merge()

    def distinct(self) -> float:
        """Different pairs over all pairs; 1 where there is none."""
        self._merge()
        return len(self._seen) / self._total if self._total else 1.0

    def _merge(self) -> None:
        self._seen, self._new = np.unique(np.concatenate([self._seen, *self._new])), []


class TextSums:
    """Figures of the texts since the last log, without keeping these texts.

    newest: the last `NEWEST` of them
    """

    def __init__(self) -> None:
        self.newest: list[Text] = []
        self._texts = 0
        self._sums: dict[str, float] = {}
        self._pairs = Pairs()

    def add(self, texts: Sequence[Text]) -> dict[str, float]:
        """Add the texts of a step; returns their own figures, as `text_figures` does."""
        figures = text_figures(texts)
        for name, mean in figures.items():
            self._sums[name] = self._sums.get(name, 0.0) + mean * len(texts)
        self._texts += len(texts)
        self._pairs.add(texts)
        self.newest = [*self.newest, *texts][-NEWEST:]
        return figures

    def figures(self) -> dict[str, float]:
        """`text_figures` of all texts that were added."""
        if not self._texts:
            return {}
        means = {name: value / self._texts for name, value in self._sums.items()}
        return means | {DISTINCT: self._pairs.distinct()}


@dataclass
class Troubles:
    """Detects steps in a row with cut or repetitive texts."""

    _cut: int = 0
    _repeated: int = 0

    def found(self, figures: Mapping[str, float], max_new_tokens: int) -> list[str]:
        """The warnings after one more step; each of them comes once in a row.

        figures: `text_figures` of the texts of the step
        """
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
    _events: deque[tuple[str, Any, Any]] = field(default_factory=deque)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time of a block."""
        if self.device.type in ("cuda", "xpu"):
            start, end = (torch.Event(self.device, enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
            # Events that the device has passed need not be kept until the next log.
            while self._events and self._events[0][2].query():
                self._take_first()
            return
        begin = time.perf_counter()
        yield
        self._add(name, time.perf_counter() - begin)

    def pop(self) -> dict[str, float]:
        """The seconds since the last call. Waits for the device."""
        while self._events:
            self._events[0][2].synchronize()
            self._take_first()
        found, self._seconds = self._seconds, {}
        return found

    def _take_first(self) -> None:
        name, start, end = self._events.popleft()
        self._add(name, start.elapsed_time(end) / 1000)

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
