"""The contribution of each row to the metrics, as sums and counts over its targets.

Rows are the unit, because the sums of a row do not depend on batch size, padding or the number of
processes, and because a row that was repeated to fill the last batch can be dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from hf_distill.errors import InputError
from hf_distill.losses.divergences import forward_kl
from hf_distill.losses.targets import IGNORE, sum_by_row

BINS = 15
"""Equal-width bins of confidence for the calibration error. Source: arXiv:1706.04599."""

OF_LABELS = ("nll", "count", "confidence", "correct")  # values of targets that have a label

CHUNK_ELEMENTS = 2**22
"""Number of logits processed at a time, which avoids a float32 copy of a whole batch."""


@torch.no_grad()
def row_sums(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    shared: int,
    labelled: Tensor | None = None,
) -> dict[str, Tensor]:
    """Sums over the targets of each row, from which the metrics are computed.

    student, teacher: (targets, outcomes) logits of all targets, row after row, in any floating
        dtype; vocabularies may differ in size; without a teacher `kl` and `agreed` are left out
    labels: (rows, positions) int64, already shifted, `IGNORE` where nothing is predicted
    shared: the first so many outcomes mean the same to both, and carry KL and agreement
    labelled: (targets,) bool, which targets have a label; the others, whose label is any outcome,
        count for KL and agreement only; None where all have one
    returns: (rows,) `nll` and `kl` in nats, float64; `targets`, `labelled` and `agreed` counts,
        int64; and (rows, BINS), by the student's top-1 confidence, `bin_count` and `bin_correct`
        counts and the sum `bin_confidence`
    raises: InputError for a label beyond the student's head, or a `shared` beyond either head
    """
    _check(student, teacher, labels, shared)
    mask = labels != IGNORE
    rows, row_of = len(labels), mask.nonzero()[:, 0]
    sums: dict[str, Tensor] = {}
    # Without any target there is still one chunk, an empty one.
    chunk = max(1, CHUNK_ELEMENTS // student.shape[-1])
    known = torch.ones_like(row_of, dtype=torch.bool) if labelled is None else labelled
    columns = (student, student if teacher is None else teacher, labels[mask], row_of, known)
    for ours, theirs, label, row, has_label in zip(*(c.split(chunk) for c in columns), strict=True):
        # The same object, so that a model agrees with itself exactly.
        other = None if teacher is None else ours if teacher is student else theirs
        values, bins = _judge(ours, other, label, shared)
        for name in OF_LABELS:
            values[name] = values[name].where(has_label, 0.0)
        found = {name: sum_by_row(value, row, rows) for name, value in values.items()}
        for name in ("count", "confidence", "correct"):
            binned = sum_by_row(values[name], row * BINS + bins, rows * BINS)
            found[f"bin_{name}"] = binned.view(rows, BINS)
            del found[name]
        sums = {name: value + sums.get(name, 0) for name, value in found.items()}
    for name in ("agreed", "bin_count", "bin_correct"):
        if name in sums:
            sums[name] = sums[name].long()
    return sums | {"targets": mask.sum(-1), "labelled": sum_by_row(known, row_of, rows).long()}


def _judge(
    student: Tensor, teacher: Tensor | None, labels: Tensor, shared: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Values of some targets, (targets,) float32 each, and the bin of each one's confidence."""
    log_student = _log_softmax(student)
    log_confidence, predicted = log_student.max(dim=-1)
    confidence = log_confidence.exp()
    values = {
        "nll": -log_student.gather(-1, labels[:, None])[:, 0],
        "count": torch.ones_like(confidence),
        "confidence": confidence,
        "correct": (predicted == labels).float(),
    }
    if teacher is not None:
        ours, theirs = student[:, :shared], teacher[:, :shared]
        log_ours = log_student if shared == student.shape[-1] else _log_softmax(ours)
        log_theirs = log_ours if teacher is student else _log_softmax(theirs)
        values["kl"] = forward_kl(log_ours, log_theirs)
        values["agreed"] = (ours.argmax(-1) == theirs.argmax(-1)).float()
    # Bin b holds (b / BINS, (b + 1) / BINS]. The bin of a NaN does not matter: the sums show it.
    bins = (confidence.nan_to_num(1.0) * BINS).ceil().long().clamp(1, BINS) - 1
    return values, bins


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits.float(), dim=-1)


def _check(student: Tensor, teacher: Tensor | None, labels: Tensor, shared: int) -> None:
    smaller = min(student.shape[-1], student.shape[-1] if teacher is None else teacher.shape[-1])
    if not 0 < shared <= smaller:
        raise InputError(
            f"the shared vocabulary is {shared} ids, but must be between 1 and {smaller}, the "
            "smaller of the two heads"
        )
    largest = int(labels.max()) if labels.numel() else 0
    if largest >= student.shape[-1]:
        raise InputError(
            f"a label is the token id {largest}, but the model predicts only "
            f"{student.shape[-1]} ids: use the model's own tokenizer"
        )


def text_bytes(
    labels: Tensor, tokenizer: PreTrainedTokenizerBase, inputs: Tensor | None = None
) -> Tensor:
    """UTF-8 bytes of the text that each row's targets spell, special tokens left out.

    labels: (rows, positions) int64, `IGNORE` where nothing is predicted
    inputs: of a causal model, the token at each position. SentencePiece's decoders remove the space
        of a first word, which shows where targets are decoded after the token before them
    returns: (rows,) int64
    """
    mask = labels != IGNORE
    ids = [row[here].tolist() for row, here in zip(labels, mask, strict=True)]
    before: list[list[int]] = [[] for _ in ids]
    if inputs is not None:
        firsts = inputs.gather(1, mask.int().argmax(1)[:, None]).tolist()
        before = [first if row else [] for first, row in zip(firsts, ids, strict=True)]
    joint = [[*a, *b] for a, b in zip(before, ids, strict=True)]
    # Without the "clean-up", which would remove spaces that are in the text.
    decoded = (
        tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for rows in (before, ids, joint)
    )
    sizes = [
        len(alone.encode()) + (whole == f"{start} {alone}")
        for start, alone, whole in zip(*decoded, strict=True)
    ]
    return torch.tensor(sizes, device=labels.device)
