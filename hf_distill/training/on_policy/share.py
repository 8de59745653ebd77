"""The share of rows that the student writes, by optimizer step."""

from __future__ import annotations

from itertools import pairwise

from transformers import TrainerState

from hf_distill.training.on_policy.arguments import OnPolicyArguments


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
    """How many evaluations found a higher loss than the one before."""
    losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    return sum(later > before for before, later in pairwise(losses))
