"""Metrics of a language model over targets, from sums and counts of rows.

They take sums, not means, so that no figure depends on how rows were batched or on how many
processes shared them. Each is an `evaluate.Metric` made here, never fetched.
"""

from __future__ import annotations

import math
import tempfile
import uuid
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

CALIBRATION_BINS = 15


class _RowMetric(evaluate.Metric):
    """A metric whose predictions are dictionaries of sums, one a row; there are no references."""

    columns: dict[str, Any] = {}  # noqa: RUF012
    description = ""

    def __init__(self, **kwargs: Any) -> None:
        # A folder and a name of its own: processes side by side never meet in a shared cache.
        self._folder = tempfile.TemporaryDirectory(prefix="hf_distill_metric_")
        super().__init__(
            cache_dir=self._folder.name,
            experiment_id=uuid.uuid4().hex,
            keep_in_memory=True,
            **kwargs,
        )

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description="Sums over the targets of each row.",
            features=datasets.Features(self.columns),
        )


_SUM = datasets.Value("float64")


class Likelihood(_RowMetric):
    """Cross-entropy per target, perplexity, and bits per byte of the text that targets cover.

    nll: sum of -ln q(label), nats; targets: their number; bytes: of the targets' text in UTF-8
    """

    description = "ce = sum nll / targets; perplexity = exp(ce); bits_per_byte = nll / ln 2 / bytes"
    columns = {"nll": _SUM, "targets": _SUM, "bytes": _SUM}  # noqa: RUF012

    def _compute(
        self, nll: Sequence[float], targets: Sequence[float], bytes: Sequence[float]
    ) -> dict[str, float]:
        total, count = math.fsum(nll), math.fsum(targets)
        ce = total / count
        result = {"ce": ce, "perplexity": math.exp(min(ce, 700.0)), "targets": count}
        covered = math.fsum(bytes)
        return result | ({"bits_per_byte": total / math.log(2) / covered} if covered else {})


class TeacherAgreement(_RowMetric):
    """How near a model is to its teacher: KL(teacher || model) per target, and top-1 agreement.

    kl: sum in nats; agree: targets where both have the same most likely token; targets: number
    """

    description = "kl_to_teacher = sum kl / targets; top1_agreement = agree / targets"
    columns = {"kl": _SUM, "agree": _SUM, "targets": _SUM}  # noqa: RUF012

    def _compute(
        self, kl: Sequence[float], agree: Sequence[float], targets: Sequence[float]
    ) -> dict[str, float]:
        count = math.fsum(targets)
        return {
            "kl_to_teacher": math.fsum(kl) / count,
            "top1_agreement": math.fsum(agree) / count,
        }


class CalibrationError(_RowMetric):
    """Expected calibration error of the top-1 prediction, in bins of equal width.

    The mean over targets of |confidence - accuracy| of the target's bin. Source: Guo et al.,
    arXiv:1706.04599. Each column holds `CALIBRATION_BINS` sums a row.
    """

    description = "sum over bins of |sum confidence - sum correct| / targets"
    columns = {
        name: datasets.List(_SUM, length=CALIBRATION_BINS) for name in ("confidence", "correct")
    } | {"targets": _SUM}

    def _compute(
        self,
        confidence: Sequence[Sequence[float]],
        correct: Sequence[Sequence[float]],
        targets: Sequence[float],
    ) -> dict[str, float]:
        gap = np.asarray(confidence).sum(0) - np.asarray(correct).sum(0)
        return {"calibration_error": float(np.abs(gap).sum() / math.fsum(targets))}
