"""The interface of backends that generate text, and its inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hf_distill.models.base import base_model
from hf_distill.models.shards import is_sharded


@dataclass(frozen=True)
class Prompt:
    """A prompt to be continued.

    ids: of a causal model the tokens before the text, of an encoder-decoder the source
    new_tokens: the most tokens that the text may have
    seed: of the text's draws, 0 to below 2**63
    """

    ids: list[int]
    new_tokens: int
    seed: int


@dataclass(frozen=True)
class Written:
    """A text: the new ids, including the end-of-text token if any, and whether it has ended."""

    ids: list[int]
    finished: bool


class Backend(Protocol):
    """Generates the student's text.

    A sampled text depends on its prompt and seed only, up to rounding.
    """

    def write(self, prompts: Sequence[Prompt]) -> list[Written]:
        """The text of each prompt. A collective of all processes, each with its own prompts."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    temperature: 0 for the likeliest tokens; top_p, top_k: see `OnPolicyArguments`
    never: ids that are not generated: those that the model's generation config suppresses, and
        those that the teacher does not share
    """

    temperature: float
    top_p: float
    top_k: int
    never: list[int]


def sampling(trainer: Any) -> Sampling:
    """The settings of a `DistillationTrainer` as they are now."""
    args, config = trainer.args, base_model(trainer.model).generation_config
    unshared = range(trainer._objective.outcomes, trainer._loss.student.outcomes)
    never = {*((config and config.suppress_tokens) or []), *unshared}
    return Sampling(args.sampling_temperature, args.top_p, args.top_k, sorted(never))


def somewhere(prompts: Sequence[Prompt], trainer: Any, *, together: bool = False) -> bool:
    """Whether there is anything to write.

    together: on any process, since processes have to act together; always so for a student in
        shards, whose weights are gathered
    """
    if not together and not is_sharded(trainer.model):
        return bool(prompts)
    number = torch.tensor(len(prompts), device=trainer.args.device)
    return bool(trainer.accelerator.reduce(number, "sum").item())
