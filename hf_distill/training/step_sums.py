"""The parts of the objective between two logs, and the check for losses that are not finite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_distill.errors import InputError, warn_once


class StepSums:
    """Adds up the parts of the objective by micro-batch and by optimizer step.

    A step whose loss is not finite stops all processes together, before the optimizer sees it. Its
    check is the only host synchronisation, once an optimizer step.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Forget everything, as at the start of a training."""
        self.steps = 0
        self._finished: dict[str, Tensor] = {}
        self._reset_step()

    def _reset_step(self) -> None:
        self._step: dict[str, Tensor] = {}
        self._not_finite = torch.zeros((), dtype=torch.bool, device=self.device)

    def add(self, parts: Mapping[str, Tensor], loss: Tensor) -> None:
        """Add a micro-batch: its share of each part's mean over the step, and its loss."""
        self._step = _added(self._step, parts)
        self._not_finite = self._not_finite | ~loss.isfinite()

    def finish_step(self, accelerator: Accelerator, step: int, last_checkpoint: str | None) -> None:
        """Close an optimizer step, at its last micro-batch.

        Under float16 a loss scale that is too large makes single steps infinite. Such a step is
        left to the GradScaler, which skips it and lowers the scale, as long as it can.
        raises: InputError on all processes, with the likely cause and the last good checkpoint
        """
        parts = torch.stack(list(self._step.values()))
        flags = torch.cat([self._not_finite[None], ~parts.isfinite()]).to(torch.int32)
        loss_is_bad, ce_is_bad, *_ = accelerator.reduce(flags, "sum").tolist()
        if not loss_is_bad:
            self._finished = _added(self._finished, self._step)
            self.steps += 1
        elif _scale_can_fall(accelerator):
            warn_once("The loss of step %s is not finite: fp16 skips it, at a lower scale.", step)
        else:
            cause = (
                "the student's own cross-entropy is not finite, so its weights have diverged: "
                "lower learning_rate, set max_grad_norm, or use bf16 instead of fp16"
                if ce_is_bad
                else "the student's cross-entropy is finite, so the teacher's logits are not: load "
                "the teacher in bfloat16 or float32 (teacher_model_kwargs)"
            )
            raise InputError(
                f"the loss is not finite at step {step}: {cause}; "
                f"last good checkpoint: {last_checkpoint or 'none yet'}"
            )
        self._reset_step()

    def pop_means(self, accelerator: Accelerator) -> dict[str, float]:
        """The mean of each part over the steps since the last call and over all processes."""
        if not self._finished:
            return {}
        means = torch.stack(list(self._finished.values())) / self.steps
        values = accelerator.reduce(means, "mean").tolist()
        found = dict(zip(self._finished, values, strict=True))
        self._finished, self.steps = {}, 0
        return found


def _added(sums: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {**sums, **{name: sums.get(name, 0.0) + value for name, value in parts.items()}}


def _scale_can_fall(accelerator: Accelerator) -> bool:
    scaler = accelerator.scaler
    return scaler is not None and scaler.is_enabled() and scaler.get_scale() >= 1.0
