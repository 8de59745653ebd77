"""The parts of the objective between two logs, and the check for losses that are not finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainingArguments

from hf_distill.errors import InputError, warn_once
from hf_distill.training.checkpoints import last_complete_checkpoint


class StepSums:
    """Adds up the parts of the objective by micro-batch and by optimizer step.

    A step whose loss is not finite stops all processes together, before the optimizer step. The
    result of this check is copied to the host asynchronously, once per optimizer step.
    """

    def __init__(self, args: TrainingArguments) -> None:
        self.args = args
        self.reset()

    def reset(self) -> None:
        """Reset all sums, at the start of a training."""
        self.steps = 0
        self._finished: dict[str, Tensor] = {}
        self._checked: tuple[int, HostCopy] | None = None
        self._step: dict[str, Tensor] = {}
        self._not_finite = torch.zeros((), dtype=torch.bool, device=self.args.device)

    def add(self, parts: Mapping[str, Tensor], loss: Tensor) -> None:
        """Add a micro-batch: its share of each part's mean over the step, and its loss."""
        self._step = _added(self._step, parts)
        self._not_finite = self._not_finite | ~loss.isfinite()

    def start_check(self, accelerator: Accelerator, step: int) -> None:
        """Start the check that a step is finite, over all processes, after its last forward.

        `finish_step` reads the result, after the host has started the backward: reading it here
        would leave the device idle.
        """
        parts = torch.stack(list(self._step.values()))
        flags = torch.cat([self._not_finite[None], ~parts.isfinite()]).to(torch.int32)
        self._checked = step, HostCopy(accelerator.reduce(flags, "sum"))

    def finish_step(self, accelerator: Accelerator) -> None:
        """Close an optimizer step whose check was started; nothing to do where none was.

        Under float16, a loss scale that is too large makes single steps infinite. The GradScaler
        skips such a step and lowers the scale, as long as it can.
        raises: InputError on all processes, with the likely cause and the last good checkpoint
        """
        if self._checked is None:
            return
        step, answer = self._checked
        loss_is_bad, ce_is_bad, *_ = answer.read()
        finished, self._step, self._checked = self._step, {}, None
        self._not_finite = torch.zeros_like(self._not_finite)
        if not loss_is_bad:
            self._finished = _added(self._finished, finished)
            self.steps += 1
        elif _scale_can_fall(accelerator):
            warn_once(
                "The loss of step %s is not finite: fp16 skips it and lowers the scale.", step
            )
        else:
            cause = (
                "the student's own cross-entropy is not finite, so its weights have diverged: "
                "lower learning_rate, set max_grad_norm, or use bf16 instead of fp16"
                if ce_is_bad
                else "the student's cross-entropy is finite, so the teacher's logits are not: load "
                "the teacher in bfloat16 or float32 (teacher_model_kwargs)"
            )
            last = last_complete_checkpoint(str(self.args.output_dir))
            raise InputError(
                f"the loss is not finite at step {step}: {cause}; "
                f"last good checkpoint: {last or 'none yet'}"
            )

    def pop_means(self, accelerator: Accelerator) -> dict[str, float]:
        """The mean of each part over the steps since the last call and over all processes."""
        if not self._finished:
            return {}
        means = torch.stack(list(self._finished.values())) / self.steps
        values = accelerator.reduce(means, "mean").tolist()
        found = dict(zip(self._finished, values, strict=True))
        self._finished, self.steps = {}, 0
        return found


def loss_for_log(trainer: Any, loss: Tensor) -> Tensor:
    """A micro-batch's loss as it is logged: the mean since the last log where it is not finite.

    With a GradScaler, which skips such steps, this stands for `logging_nan_inf_filter`, and does
    not wait for the device. Without one, a loss that is not finite has ended the training.
    """
    if trainer.accelerator.scaler is None:
        return loss
    steps = 1 + trainer.state.global_step - trainer._globalstep_last_logged
    return torch.where(loss.isfinite(), loss, trainer._tr_loss / steps)


class HostCopy:
    """An asynchronous copy of a tensor to the host."""

    def __init__(self, tensor: Tensor) -> None:
        # Only on these devices is the copy known to run beside the host.
        beside = tensor.device.type in ("cuda", "xpu")
        self._tensor = tensor.to("cpu", non_blocking=True) if beside else tensor
        self._done = torch.Event(tensor.device) if beside else None
        if self._done is not None:
            self._done.record()

    def read(self) -> list[Any]:
        """The values. Waits for the copy, not for work that was given to the device after it."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensor.tolist()


def _added(sums: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {**sums, **{name: sums.get(name, 0.0) + value for name, value in parts.items()}}


def _scale_can_fall(accelerator: Accelerator) -> bool:
    scaler = accelerator.scaler
    return scaler is not None and scaler.is_enabled() and scaler.get_scale() >= 1.0
