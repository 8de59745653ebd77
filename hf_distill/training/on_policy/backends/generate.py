"""Generate text with transformers' `generate`, in batches of prompts of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch

from hf_distill.models.base import base_model
from hf_distill.models.generation import PLAIN, Generator
from hf_distill.models.mixture import Mixture
from hf_distill.models.shards import whole_weights
from hf_distill.training.on_policy.backends.base import Prompt, Written, sampling, somewhere

# Prompts of similar length that are continued together.
ROWS_AT_A_TIME = 32


class GenerateBackend:
    """Generates with the student itself, in eval mode; see `Backend`.

    A sharded student is gathered once for all texts of a step, since the number and length of texts
    differ between processes.

    trainer: a `DistillationTrainer`; pad_token_id: the padding, which is masked
    """

    def __init__(self, trainer: Any, pad_token_id: int) -> None:
        self.trainer, self.pad_token_id = trainer, pad_token_id

    def write(self, prompts: Sequence[Prompt]) -> list[Written]:
        """See `Backend`."""
        found: dict[int, Written] = {}
        if not somewhere(prompts, self.trainer):
            return []
        order = sorted(
            enumerate(prompts), key=lambda one: (len(one[1].ids), one[1].ids, one[1].new_tokens)
        )
        with self._writing() as model:
            for length, group in groupby(order, key=lambda one: one[1].new_tokens):
                same, generator = list(group), self._generator(model, length)
                for at in range(0, len(same), ROWS_AT_A_TIME):
                    part = same[at : at + ROWS_AT_A_TIME]
                    seeds = [[prompt.seed] for _, prompt in part]
                    texts = generator.texts([prompt.ids for _, prompt in part], seeds)
                    for (number, _), text in zip(part, texts, strict=True):
                        found[number] = Written(*text)
        return [found[number] for number in range(len(prompts))]

    def _generator(self, model: Any, length: int) -> Generator:
        how = sampling(self.trainer)
        settings: dict[str, Any] = {**PLAIN, "max_new_tokens": length}
        if how.temperature > 0:
            settings |= {
                "do_sample": True, "temperature": how.temperature,
                "top_p": how.top_p, "top_k": how.top_k,
            }  # fmt: skip
        if how.never:
            settings["suppress_tokens"] = how.never
        mixture, teacher, share = None, self.trainer.teacher, self.trainer.args.teacher_mix
        if share:
            outcomes = self.trainer._objective.outcomes
            mixture = Mixture(teacher.model, share, outcomes, teacher.active)
        return Generator(
            model,
            settings,
            pad_token_id=self.pad_token_id,
            autocast=self.trainer.accelerator.autocast,
            mixture=mixture,
        )

    @contextmanager
    def _writing(self) -> Iterator[Any]:
        """The student in eval mode; modes and the random state are afterwards as before."""
        model = self.trainer.model
        modes = [(module, module.training) for module in model.modules()]
        devices = [self.trainer.args.device] if self.trainer.args.device.type == "cuda" else []
        model.eval()
        try:
            with torch.random.fork_rng(devices), whole_weights(model):
                yield base_model(model) if not hasattr(model, "peft_config") else model
        finally:
            for module, training in modes:
                module.training = training
