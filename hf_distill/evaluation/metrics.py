"""`evaluate` metrics of predicted distributions, made of sums by row.

Create them directly (`Perplexity()`), so that nothing is downloaded. They take the columns of
`hf_distill.evaluation.row_sums` through `add_batch` or `compute`, like any metric of `evaluate`:

    metric = Perplexity()
    metric.add_batch(nll=[12.5, 9.1], targets=[6, 4])
    metric.compute()  # {"ce": 2.16, "perplexity": 8.67...}

All sums are exactly rounded, so a result does not depend on the order of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import ClassVar

import evaluate
from datasets import Features, List, Value

from hf_distill.errors import InputError
from hf_distill.evaluation.row_sums import BINS

_COUNT, _SUM = Value("int64"), Value("float64")
_COUNTS, _SUMS = List(_COUNT, length=BINS), List(_SUM, length=BINS)


class RowMetric(evaluate.Metric):
    """A metric over columns that hold one value (or one list of bins) a row."""

    columns: ClassVar[dict[str, Value | List]]

    def __init__(self) -> None:
        # `evaluate` makes a cache folder even for a metric that is kept in memory. A temporary one
        # leaves nothing behind, and parallel processes cannot meet in it.
        with TemporaryDirectory() as unused:
            super().__init__(keep_in_memory=True, cache_dir=unused)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description=f"One value a row of: {', '.join(self.columns)}.",
            features=Features(self.columns),
        )


class CrossEntropy(RowMetric):
    """`ce`: mean negative log-likelihood of a target that has a label, in nats."""

    columns: ClassVar = {"nll": _SUM, "labelled": _COUNT}

    def _compute(self, nll: Sequence[float], labelled: Sequence[int]) -> dict[str, float]:
        return {"ce": math.fsum(nll) / _at_least_one(sum(labelled))}


class Perplexity(RowMetric):
    """`ce`: mean negative log-likelihood of a target, in nats; `perplexity`: exp(ce)."""

    columns: ClassVar = {"nll": _SUM, "targets": _COUNT}

    def _compute(self, nll: Sequence[float], targets: Sequence[int]) -> dict[str, float]:
        ce = math.fsum(nll) / _at_least_one(sum(targets))
        try:
            return {"ce": ce, "perplexity": math.exp(ce)}
        except OverflowError as error:
            raise InputError(
                f"the mean loss is {ce:.4g} nats a target, so the perplexity overflows: the "
                "model's weights have diverged, or the tokenizer is not the model's"
            ) from error


class BitsPerByte(RowMetric):
    """`bits_per_byte`: bits to code the text, by its UTF-8 bytes; comparable across tokenizers."""

    columns: ClassVar = {"nll": _SUM, "bytes": _COUNT}

    def _compute(self, nll: Sequence[float], bytes: Sequence[int]) -> dict[str, float]:
        if not sum(bytes):
            raise InputError(
                "the targets are special tokens only, so there are no bits per byte: check the "
                "evaluation rows and the tokenizer"
            )
        return {"bits_per_byte": math.fsum(nll) / math.log(2) / sum(bytes)}


class TeacherAgreement(RowMetric):
    """`kl_to_teacher`: KL(teacher || student) in nats a target; `top1_agreement`: share of
    targets at which both have the same most likely outcome."""

    columns: ClassVar = {"kl": _SUM, "agreed": _COUNT, "targets": _COUNT}

    def _compute(
        self, kl: Sequence[float], agreed: Sequence[int], targets: Sequence[int]
    ) -> dict[str, float]:
        total = _at_least_one(sum(targets))
        return {"kl_to_teacher": math.fsum(kl) / total, "top1_agreement": sum(agreed) / total}


class CalibrationError(RowMetric):
    """`calibration_error`: expected distance between top-1 confidence and accuracy, in equal-width
    bins of confidence, between 0 and 1. Source: Guo et al., arXiv:1706.04599."""

    columns: ClassVar = {"bin_count": _COUNTS, "bin_confidence": _SUMS, "bin_correct": _COUNTS}

    def _compute(
        self,
        bin_count: Sequence[Sequence[int]],
        bin_confidence: Sequence[Sequence[float]],
        bin_correct: Sequence[Sequence[int]],
    ) -> dict[str, float]:
        total = _at_least_one(sum(map(sum, bin_count)))
        confidence = [math.fsum(of_bin) for of_bin in zip(*bin_confidence, strict=True)]
        correct = [sum(of_bin) for of_bin in zip(*bin_correct, strict=True)]
        gaps = (abs(c - k) for c, k in zip(confidence, correct, strict=True))
        return {"calibration_error": math.fsum(gaps) / total}


def _at_least_one(targets: int) -> int:
    if targets:
        return targets
    raise InputError(
        "the evaluation rows have no target, since every label in them is -100: "
        "check how their labels are masked"
    )
