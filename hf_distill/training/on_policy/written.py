"""The entry of a batch that marks the student's own targets, with their signal and divergence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from hf_distill.data import TEACHER_PROMPT_IDS
from hf_distill.losses.divergences import Divergence, named_divergence, reverse_kl
from hf_distill.losses.objective import Objective
from hf_distill.losses.parts import Part, at
from hf_distill.losses.policy_gradient import Draws
from hf_distill.losses.signals import Hidden
from hf_distill.losses.targets import Targets
from hf_distill.recordings.reader import recorded_signal, without_recording
from hf_distill.tasks import Task
from hf_distill.training.on_policy.arguments import DRAWN, SEQUENCE, OnPolicyArguments

WRITTEN = "written"

# The names of their denominators beside `losses.targets.DENOMINATORS`.
OWN_TARGETS, DATA_TARGETS = "written_targets", "data_targets"


@dataclass(frozen=True)
class Written:
    """A batch in which generated rows and data rows have separate losses.

    rows: (rows,) bool, the generated rows
    own, data: int64, the places of their targets among all targets of the batch, ascending
    asked: the batch that the live teacher reads, with labels; None for the student's own batch
    asked_index: the target index of `asked`. Its targets, in their order, are those of `own` if
        the data rows have recordings, else all of the student's batch
    divergence: of the student's own text, by name; None for that of the data rows
    draws: what the loss makes of the student's own draws
    """

    rows: Tensor
    own: Tensor
    data: Tensor
    asked: Mapping[str, Tensor] | None = None
    asked_index: Tensor | None = None
    divergence: tuple[str, Divergence] | None = None
    draws: Draws | None = None

    def asked_inputs(self, task: Task) -> tuple[dict[str, Any], Targets]:
        """The live teacher's inputs, if it reads another batch than the student."""
        assert self.asked is not None
        return task.model_inputs(self.asked), task.targets(self.asked, self.asked_index)


def judged_apart(
    loss: Any, batch: Mapping[str, Any], written: Written, targets: Targets, objective: Objective
) -> tuple[Part, ...]:
    """The student's own text and the data rows of a batch, each with its signal and divergence.

    loss: the `DistillationLoss`; batch: with its recordings
    """
    signals: list[Any] = [None, None]
    if objective.alpha > 0:
        recorded = recorded_signal(batch, targets)
        inputs, asked = loss.task.model_inputs(without_recording(batch)), targets
        if written.asked is not None:
            inputs, asked = written.asked_inputs(loss.task)
        if recorded is None:
            everywhere = loss.asked(loss.teacher_inputs(inputs), asked)
            signals = [at(everywhere, written.own), at(everywhere, written.data)]
        else:
            signals[1] = at(recorded, written.data)
            if len(asked) or getattr(loss.teacher, "together", False):
                signals[0] = loss.asked(loss.teacher_inputs(inputs), asked)
    name, function = written.divergence or (objective.name, objective.divergence)
    ours = replace(objective, name=f"written_{name}", divergence=function)
    together = bool(getattr(loss.teacher, "together", False))
    own, data = (together and isinstance(signal, Hidden) for signal in signals)
    return (
        Part(written.own, signals[0], ours, OWN_TARGETS, written.draws, own),
        Part(written.data, signals[1], objective, DATA_TARGETS, None, data),
    )


def own_divergence(args: OnPolicyArguments) -> tuple[str, Divergence] | None:
    """Name and function of the divergence of the student's own text; None for that of all rows."""
    name = args.on_policy_divergence
    if name is None:
        return None
    if name in (DRAWN, SEQUENCE):  # the former judges tokens, not distributions
        return name, reverse_kl
    settings: Any = args
    return name, named_divergence(name, beta=settings.beta, skew=settings.skew)


def own_draws(args: OnPolicyArguments) -> Draws | None:
    """How the loss uses the student's samples; None if it uses distributions only."""
    name, share = args.on_policy_divergence, args.teacher_mix
    if not share and name not in (DRAWN, SEQUENCE):
        return None
    return Draws(token=name == DRAWN, returns=name == SEQUENCE, teacher_mix=share)


def without_written(batch: Mapping[str, Any]) -> tuple[dict[str, Any], Written | None]:
    """A batch without what only on-policy rows have, and the entry `WRITTEN`."""
    ours = (WRITTEN, TEACHER_PROMPT_IDS)  # the latter in evaluation, which asks as the student
    rest = {name: value for name, value in batch.items() if name not in ours}
    return rest, batch.get(WRITTEN)
