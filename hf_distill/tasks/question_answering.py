"""Extractive question answering: where in the context an answer starts and ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_distill.errors import InputError
from hf_distill.losses.targets import IGNORE, Targets
from hf_distill.models.heads import has_head
from hf_distill.tasks.base import Task

# As many outcomes as the longest row has positions, whatever that is.
POSITIONS = 2**31 - 1
# The logit of a position that cannot be an answer: finite, so that differences are numbers, and its
# probability is exactly 0 in float32 up to a temperature of 90.
IMPOSSIBLE = -1e4
# A column of the rows: 1 where an answer may be, 0 for the question and special tokens.
ANSWER_MASK = "answer_mask"
MASKS = ("attention_mask", ANSWER_MASK)


class QuestionAnswering(Task):
    """A row has two targets, start and end. Their outcomes are the row's positions.

    Padding is not an outcome, and neither are positions where `answer_mask`, if the rows have it,
    is 0. A question without an answer has the position of the first token as both labels.
    """

    key: ClassVar[str] = "question-answering"
    name: ClassVar[str] = "extractive question answering"
    fused: ClassVar[bool] = False
    aligned: ClassVar[bool] = False
    label_names: ClassVar[tuple[str, ...]] = ("start_positions", "end_positions")
    withheld: ClassVar[tuple[str, ...]] = (ANSWER_MASK,)
    reads: ClassVar[tuple[str, ...]] = ("start_positions", "end_positions", "input_ids")
    not_recorded: ClassVar[str | None] = "its outcomes are the positions of a row"

    @classmethod
    def refusal(cls, model: Any) -> str | None:
        """See `Task.refusal`."""
        if not has_head(model, cls.key):
            return "it does not mark answers: load it with AutoModelForQuestionAnswering"
        return None

    def labels(self, batch: Mapping[str, Any]) -> Tensor:
        """See `Task.labels`. A position beyond the row is no target, as in transformers."""
        labels = torch.stack([batch[name] for name in self.label_names], dim=1)
        positions = batch["input_ids"].shape[-1]
        return labels.masked_fill((labels < 0) | (labels >= positions), IGNORE)

    def outcomes(self, model: Any) -> int:
        """See `Task.outcomes`."""
        return POSITIONS

    def logits(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """See `Task.logits`: (rows, 2, positions)."""
        logits = torch.stack((outputs.start_logits, outputs.end_logits), dim=1)
        for name in MASKS:
            if inputs.get(name) is not None:
                logits = logits.masked_fill(inputs[name][:, None] == 0, IMPOSSIBLE)
        return logits

    def check(self, batch: Mapping[str, Any], targets: Targets, outcomes: int) -> None:
        """See `Task.check`."""
        for name in MASKS:
            if (mask := batch.get(name)) is None:
                continue
            possible = mask[targets.row_of, targets.labels] != 0
            if not bool(possible.all()):
                row = int(targets.row_of[~possible][0])
                raise InputError(
                    f"the answer of row {row} of a batch is where {name} is 0, so it cannot be "
                    "predicted: check how the positions were made"
                )
