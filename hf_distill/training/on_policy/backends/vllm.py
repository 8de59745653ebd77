"""Generate text with vLLM in the training's own process; helpers shared with the server backend."""

from __future__ import annotations

import importlib.util
import os
import random
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_distill.errors import InputError
from hf_distill.models.base import base_model
from hf_distill.models.shards import whole_weights
from hf_distill.training.on_policy.backends.base import (
    Prompt,
    Written,
    sampling,
    somewhere,
)
from hf_distill.training.on_policy.backends.merged_weights import merged_weights


class VllmBackend:
    """An engine of vLLM on each process's own device; see `Backend`.

    The engine is made at the first step from the student's config. At each step with texts to
    generate, it receives the student's weights, with an adapter merged into them.

    trainer: a `DistillationTrainer`
    raises: InputError where vLLM is missing or cannot run this student
    """

    def __init__(self, trainer: Any) -> None:
        refuse_unfit(trainer)
        self.trainer = trainer
        self._made: Any = None

    def write(self, prompts: Sequence[Prompt]) -> list[Written]:
        """See `Backend`."""
        if not somewhere(prompts, self.trainer):
            return []
        with _kept_random_state(self.trainer.args.device):
            engine = self._engine()
            with whole_weights(self.trainer.model), merged_weights(self.trainer.model) as weights:
                engine.apply_model(lambda model: _load(model, weights))
            engine.reset_prefix_cache()  # its content was computed with other weights
            if not prompts:
                return []
            found = engine.generate(
                [{"prompt_token_ids": prompt.ids} for prompt in prompts],
                self._parameters(prompts),
                use_tqdm=False,
            )
        ends = end_ids(self.trainer)
        return [written(list(one.outputs[0].token_ids), ends) for one in found]

    def _engine(self) -> Any:
        """The engine, made in the first call with weights that are replaced before it writes."""
        if self._made is not None:
            return self._made
        # With another process, weights must be sent to it and samples depend on its schedule.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        args, student = self.trainer.args, base_model(self.trainer.model)
        options: dict[str, Any] = {}
        if self.trainer.accelerator.num_processes > 1:  # else each would look for its own group
            options["distributed_executor_backend"] = "external_launcher"
        if args.max_length is not None:  # else memory is kept for the longest text of the model
            most = args.max_length + args.max_new_tokens
            limit = self.trainer._loss.student.longest_text
            options["max_model_len"] = most if limit is None else min(most, limit)
        with tempfile.TemporaryDirectory() as folder:
            student.config.save_pretrained(folder)
            self._made = LLM(
                model=folder,
                skip_tokenizer_init=True,
                load_format="dummy",
                dtype=_dtype(args, student),
                gpu_memory_utilization=args.vllm_memory,
                seed=args.seed,
                **options,
            )
        return self._made

    def _parameters(self, prompts: Sequence[Prompt]) -> list[Any]:
        from vllm import SamplingParams

        common = choice(self.trainer) | {"detokenize": False}
        return [
            SamplingParams(max_tokens=prompt.new_tokens, seed=prompt.seed, **common)
            for prompt in prompts
        ]


def refuse_unfit(trainer: Any) -> None:
    """Raise InputError where vLLM is missing or cannot run the student of this trainer."""
    student: Any = base_model(trainer.model)
    if importlib.util.find_spec("vllm") is None:
        raise InputError(
            "writing_backend is 'vllm', but vllm is not installed: install it, or set "
            "writing_backend to 'generate'"
        )
    unfit = {
        "an encoder-decoder": student.config.is_encoder_decoder,
        "quantised": getattr(student, "is_quantized", False),
        "with an adapter that cannot be merged": hasattr(trainer.model, "peft_config")
        and not hasattr(trainer.model, "merge_adapter"),
    }
    for kind in (kind for kind, found in unfit.items() if found):
        raise InputError(
            f"writing_backend is 'vllm', but the student is {kind}, whose weights cannot be "
            "sent to vLLM: set writing_backend to 'generate'"
        )


def choice(trainer: Any) -> dict[str, Any]:
    """How tokens are chosen and where a text ends, by vLLM's names; alike for all prompts."""
    how = sampling(trainer)
    found: dict[str, Any] = {"temperature": how.temperature}
    if how.temperature > 0:
        found |= {"top_p": how.top_p, "top_k": how.top_k}
    if how.never:
        never, outcomes = set(how.never), range(trainer._loss.student.outcomes)
        found["allowed_token_ids"] = [token for token in outcomes if token not in never]
    return found | {"stop_token_ids": sorted(end_ids(trainer))}


def end_ids(trainer: Any) -> set[int]:
    """The ids that end a text of the student."""
    config = base_model(trainer.model).generation_config
    ends = config and config.eos_token_id
    return set() if ends is None else {*(ends if isinstance(ends, list) else [ends])}


def written(ids: list[int], ends: Collection[int]) -> Written:
    """A text of vLLM, which has its end-of-text token if it ended before its limit."""
    return Written(ids, bool(ids) and ids[-1] in ends)


def _load(model: Any, weights: Sequence[tuple[str, Tensor]]) -> None:
    model.load_weights(weights)


def _dtype(args: Any, student: Any) -> str:
    """The dtype in which the student's own forward would compute."""
    if args.bf16 or args.fp16:
        return "bfloat16" if args.bf16 else "float16"
    return str(student.dtype).removeprefix("torch.")


@contextmanager
def _kept_random_state(device: torch.device) -> Iterator[None]:
    """A context that restores all random states, which an engine in this process sets."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
