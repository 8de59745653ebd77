"""Read recordings: the signal in a batch, the header of a data set, and checks that they fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hf_distill.errors import InputError
from hf_distill.losses import divergences
from hf_distill.losses.divergences import Divergence
from hf_distill.losses.signals import Logits, Sampled, Signal, TopK
from hf_distill.losses.targets import Targets
from hf_distill.recordings.collator import ALL_NAMES, header_of
from hf_distill.recordings.row_format import COLUMN, Header


def recorded_signal(batch: Mapping[str, Any], targets: Targets) -> Signal | None:
    """The signal that a batch carries (see `RecordingCollator`); None where it carries none."""
    if "teacher_logits" in batch:
        return Logits(targets.select(batch["teacher_logits"]))
    if "teacher_ids" not in batch:
        return None
    if "teacher_weights" in batch:
        names = ("teacher_ids", "teacher_weights", "teacher_entropy")
        return Sampled(*(targets.select(batch[name]) for name in names))
    names = ("teacher_ids", "teacher_log_probs", "teacher_log_tail")
    return TopK(*(targets.select(batch[name]) for name in names))


def without_recording(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without its recordings."""
    return {name: value for name, value in batch.items() if name not in ALL_NAMES}


def first_header(dataset: Any, what: str) -> Header | None:
    """The header of the recording in a data set's first row; None where there is none.

    dataset: anything with rows that are mappings; of a stream the first row is read
    what: the name of the data set, for errors
    """
    names = getattr(dataset, "column_names", None)
    if dataset is None or (names is not None and COLUMN not in names):
        return None
    try:
        row = dataset[0] if hasattr(dataset, "__len__") else next(iter(dataset))
    except (IndexError, KeyError, StopIteration):
        return None
    if not isinstance(row, Mapping) or row.get(COLUMN) is None:
        return None
    return header_of(row[COLUMN], f"the first row of {what}")


def check_recording(
    header: Header, what: str, *, temperature: float, divergence: Divergence, student_rows: int
) -> None:
    """InputError where a recording cannot serve this objective."""
    # A recording stores its temperature in float32, in which 0.7 is another number.
    if header.kind != "full" and np.float32(header.temperature) != np.float32(temperature):
        raise InputError(
            f"{what} was recorded at temperature {header.temperature:g}, but temperature is "
            f"{temperature:g}, and outputs at one cannot be computed from those at the other: set "
            f"temperature to {header.temperature:g}, or record again at {temperature:g}"
        )
    if header.kind == "sampled" and divergence is not divergences.forward_kl:
        raise InputError(
            f"{what} was recorded by drawing samples, which estimates forward_kl without bias and "
            "no other divergence: set divergence to forward_kl, or record with kind top_k"
        )
    if header.vocabulary > student_rows:
        raise InputError(
            f"{what} was recorded over {header.vocabulary} ids, but the student predicts only "
            f"{student_rows}: use a student with the teacher's tokenizer"
        )
