"""Generate text with a vLLM server on other devices, which receives the student's weights."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from hf_distill.errors import InputError
from hf_distill.models.shards import whole_weights
from hf_distill.training.on_policy.backends.base import Prompt, Written, somewhere
from hf_distill.training.on_policy.backends.merged_weights import merged_weights
from hf_distill.training.on_policy.backends.vllm import choice, end_ids, refuse_unfit, written

REQUESTS_AT_A_TIME = 64  # of each process; the server batches those of all processes
TIMEOUT_S = 600
# A server takes what is not sent from the generation config of its checkpoint.
PLAIN_SAMPLING = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class VllmServerBackend:
    """A server that was started with `vllm serve`; see `Backend`.

    Before each step that writes, the main process sends it the student's weights over NCCL, with an
    adapter merged into them. Then each process requests its own texts.

    trainer: a `DistillationTrainer`, whose `vllm_server` is the address
    raises: InputError where vLLM is missing, cannot run this student, or the server does not answer
    """

    def __init__(self, trainer: Any) -> None:
        refuse_unfit(trainer)
        self.trainer, self.address = trainer, trainer.args.vllm_server.rstrip("/")
        try:
            self.model = self._call("/v1/models")["data"][0]["id"]
        except (OSError, ValueError, LookupError) as error:
            raise InputError(
                f"vllm_server {self.address} does not answer as a server of vLLM ({error}): start "
                "one with VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config "
                """'{"backend": "nccl"}', or leave vllm_server out"""
            ) from error
        self._weights = _Weights()
        self._transfer: Any = None

    def write(self, prompts: Sequence[Prompt]) -> list[Written]:
        """See `Backend`."""
        accelerator = self.trainer.accelerator
        if not somewhere(prompts, self.trainer, together=True):
            return []
        with whole_weights(self.trainer.model), merged_weights(self.trainer.model) as weights:
            if accelerator.is_main_process:
                self._send(weights)
        accelerator.wait_for_everyone()  # nobody writes with the weights of the step before
        if not prompts:
            return []
        common = {"model": self.model, "return_token_ids": True} | PLAIN_SAMPLING
        common |= choice(self.trainer)
        ends = end_ids(self.trainer)

        def text(prompt: Prompt) -> Written:
            asked = {"prompt": prompt.ids, "max_tokens": prompt.new_tokens, "seed": prompt.seed}
            answer = self._call("/v1/completions", common | asked)
            return written(answer["choices"][0]["token_ids"], ends)

        with ThreadPoolExecutor(REQUESTS_AT_A_TIME) as threads:
            return list(threads.map(text, prompts))

    def _send(self, weights: Sequence[tuple[str, Tensor]]) -> None:
        from vllm.distributed.weight_transfer import (
            HTTPVLLMWeightSyncClient,
            ModuleSource,
            WeightTransferTrainerFactory,
        )
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_ip, get_open_port

        self._weights.now = weights
        if self._transfer is None:
            self._transfer = WeightTransferTrainerFactory.trainer_init(
                init_info=NCCLTrainerInitInfo(
                    master_address=get_ip(),
                    master_port=get_open_port(),
                    world_size=1 + self._call("/get_world_size")["world_size"],
                    rank=0,
                ),
                client=HTTPVLLMWeightSyncClient(self.address),
                source=ModuleSource(self._weights),
            )
        self._transfer.send_weights()
        self._weights.now = ()
        self._call("/reset_prefix_cache", {})  # what it remembers was computed with other weights

    def _call(self, path: str, content: dict[str, Any] | None = None) -> Any:
        """The answer to a GET, or with content to a POST request; None where it is empty."""
        request = urllib.request.Request(
            self.address + path,
            data=None if content is None else json.dumps(content).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            reason = error.read().decode(errors="replace")[:500]
            raise OSError(f"{path} answers {error.code}: {reason}") from error
        return json.loads(text) if text else None


class _Weights:
    """What `ModuleSource` reads of a module: the weights of this step by name."""

    def __init__(self) -> None:
        self.now: Sequence[tuple[str, Tensor]] = ()

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.now)
