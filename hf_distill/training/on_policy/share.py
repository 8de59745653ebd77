"""The share of rows that the student writes, by optimizer step."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean

from transformers import TrainerState

from hf_distill.training.on_policy.arguments import OnPolicyArguments

LOSS = re.compile("eval_(.*_)?loss")


def share_now(args: OnPolicyArguments, state: TrainerState) -> float:
    """The share in the step that comes next, 0 to 1; the same on every process.

    It follows from the arguments and the trainer's state alone, so that it is the same again after
    an interruption.
    """
    raised = args.on_policy_raise * rises(state) if args.on_policy_raise else 0.0
    steps = args.on_policy_warmup
    if steps < 1:
        steps *= state.max_steps
    risen = 1.0 if steps <= 0 else min(1.0, state.global_step / steps)
    return min(1.0, args.on_policy * risen + raised)


def rises(state: TrainerState) -> int:
    """How many evaluations found a higher loss than the one before.

    The loss of an evaluation of several named sets is the mean of theirs, each set with equal
    weight. Evaluations of other sets than the one before are not compared with it.
    """
    return sum(
        later.keys() == before.keys() and fmean(later.values()) > fmean(before.values())
        for before, later in pairwise(_evaluations(state.log_history))
    )


def _evaluations(log: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """The losses of each evaluation, by key: `eval_loss`, or `eval_NAME_loss` of each named set.

    Trainer logs an entry for each set, all of one evaluation with the same step.
    """
    found: list[dict[str, float]] = []
    step: float | None = None
    for entry in log:
        keys = [key for key in entry if LOSS.fullmatch(key)]
        if not keys:
            continue
        loss = min(keys, key=len)  # a metric of the user's own may end in "_loss" too
        if not found or entry.get("step") != step or loss in found[-1]:
            found.append({})
        found[-1][loss], step = entry[loss], entry.get("step")
    return found
