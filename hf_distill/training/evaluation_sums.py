"""Evaluation as sums over rows, exact for any batch size and any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hf_distill.errors import InputError
from hf_distill.losses.objective import Objective
from hf_distill.losses.targets import DENOMINATORS, accumulator, sum_by_row
from hf_distill.training.loss import BatchLoss


class EvaluationSums:
    """The sums of one evaluation so far."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._denominators: dict[str, str] = {}
        self._term_weights: dict[str, float] = {}

    def add(
        self,
        batch: BatchLoss,
        counts_by_row: Tensor,
        gather: Callable[[Tensor], Tensor],
    ) -> None:
        """Add a batch.

        counts_by_row: (rows, counts), as `Task.counts` gives them
        gather: over processes by row, so that rows repeated to fill the last batch are dropped
        """
        rows, row_of = batch.targets.shape[0], batch.targets.row_of
        sums: dict[str, Tensor] = {}
        for name, (values, denominator) in batch.per_target.items():
            sums[name] = sum_by_row(values, row_of, rows)
            self._denominators[name] = denominator
        for name, term in batch.terms.items():
            sums[name] = term.row_sums
            self._denominators[name] = term.denominator
            self._term_weights[name] = term.weight
        sums |= dict(zip(DENOMINATORS, counts_by_row.unbind(-1), strict=True))
        table = torch.stack([s.to(accumulator(s)) for s in sums.values()], dim=-1)  # (rows, sums)
        for name, total in zip(sums, gather(table).sum(0), strict=True):
            self._sums[name] = self._sums.get(name, 0.0) + total

    def metrics(self, objective: Objective) -> dict[str, float]:
        """`loss` and its parts, each a sum divided once; nothing where no batch was added.

        A part over no target is left out, as the cross-entropy of rows without labels: 0.0 would
        look like a perfect result.
        raises: InputError where no row has a target
        """
        if not self._sums:
            return {}
        sums = {name: float(value) for name, value in self._sums.items()}
        counts = {name: sums.pop(name) for name in DENOMINATORS}
        if counts["targets"] == 0:
            raise InputError(
                "the evaluation set has no target, since every label in it is -100: "
                "check how its labels are masked"
            )
        means = {
            name: value / counts[self._denominators[name]]
            for name, value in sums.items()
            if counts[self._denominators[name]]
        }
        return {"loss": self._loss(means, objective), **means}

    def _loss(self, means: Mapping[str, float], objective: Objective) -> float:
        loss = (1 - objective.alpha) * means.get("ce", 0.0)
        scale = objective.alpha * objective.temperature**2
        loss += scale * means.get(objective.name, 0.0)
        return loss + sum(
            weight * means.get(name, 0.0) for name, weight in self._term_weights.items()
        )
