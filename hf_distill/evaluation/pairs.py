"""The base of metrics that compare predictions with references, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import evaluate
from datasets import Features, List, Value

from hf_distill.errors import InputError
from hf_distill.evaluation.metrics import RowMetric


class PairMetric(RowMetric):
    """A metric over the columns `predictions` and `references`.

    It is instantiated as it is, so nothing is downloaded, and used as any metric of `evaluate`:

        Rouge().compute(predictions=["a summary"], references=["the summary"])
    """

    def compute(
        self, *, predictions: Any = None, references: Any = None, **kwargs: Any
    ) -> dict[str, float]:
        """Compute the figures over the given rows and those that `add_batch` was given.

        predictions, references: one value a row; see the class
        kwargs: options of the metric
        raises: InputError for no rows, or for another number of references
        """
        if predictions is not None and references is not None:
            if len(predictions) != len(references):
                raise InputError(
                    f"there are {len(predictions)} predictions and {len(references)} references, "
                    "but each row needs one of both"
                )
            if not len(predictions):
                raise InputError("there are no predictions to measure: give at least one row")
        return super().compute(predictions=predictions, references=references, **kwargs)


class TextMetric(PairMetric):
    """A metric of written text. A reference is a text, or a list of equally good texts."""

    columns: ClassVar = {"predictions": Value("string"), "references": List(Value("string"))}

    def _info(self) -> evaluate.MetricInfo:
        info = super()._info()
        one = {"predictions": Value("string"), "references": Value("string")}
        info.features = [Features(self.columns), Features(one)]
        return info


def listed(references: Sequence[str | Sequence[str]]) -> list[list[str]]:
    """The references of each row as a list; InputError for a row without any."""
    found = [[one] if isinstance(one, str) else list(one) for one in references]
    for row, texts in enumerate(found):
        if not texts:
            raise InputError(f"row {row} has no reference text to compare with: leave it out")
    return found
