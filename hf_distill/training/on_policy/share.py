"""The share of rows that the student writes, by optimizer step."""

from __future__ import annotations

from transformers import TrainerState

from hf_distill.training.on_policy.arguments import OnPolicyArguments


def share_now(args: OnPolicyArguments, state: TrainerState) -> float:
    """The share in the step that comes next, 0 to 1; the same on every process.

    It follows from the arguments and the trainer's state alone, so that it is the same again after
    an interruption.
    """
    steps = args.on_policy_warmup
    if steps < 1:
        steps *= state.max_steps
    risen = 1.0 if steps <= 0 else min(1.0, state.global_step / steps)
    return args.on_policy * risen
