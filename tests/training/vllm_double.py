"""A double of vLLM with the documented interface that the backends use, and its server."""

from __future__ import annotations

import importlib.machinery
import json
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM


class SamplingParams:
    def __init__(
        self,
        *,
        max_tokens: int,
        seed: int,
        temperature: float,
        stop_token_ids: list[int],
        detokenize: bool,
        top_p: float = 1.0,
        top_k: int = 0,
        allowed_token_ids: list[int] | None = None,
    ) -> None:
        self.__dict__.update(locals())


class LLM:
    """Writes each text by itself, token by token, without a cache."""

    made: ClassVar[list[LLM]] = []

    def __init__(self, model: str, load_format: str, seed: int, **options: Any) -> None:
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        self.options = options
        self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).eval()
        self.asked: list[list[SamplingParams]] = []
        self.stale = False
        assert load_format == "dummy"
        LLM.made.append(self)

    def apply_model(self, function: Any) -> list[Any]:
        self.stale = True
        return [function(SimpleNamespace(load_weights=self.load_weights))]

    def load_weights(self, weights: Any) -> None:
        given = {name: value.clone() for name, value in weights}
        names = {name for name, _ in self.model.named_parameters()}
        assert given.keys() == names, given.keys() ^ names
        self.model.load_state_dict(given, strict=False)

    def reset_prefix_cache(self) -> None:
        self.stale = False

    @torch.no_grad()
    def generate(self, prompts: Any, parameters: list[SamplingParams], use_tqdm: bool) -> Any:
        assert not self.stale
        self.asked.append(parameters)
        torch.rand(7)  # an engine in this process draws from its random state
        return [
            SimpleNamespace(outputs=[SimpleNamespace(token_ids=self.text(prompt, how))])
            for prompt, how in zip(prompts, parameters, strict=True)
        ]

    def text(self, prompt: dict[str, list[int]], how: Any) -> list[int]:
        generator, ids = torch.Generator().manual_seed(how.seed), list(prompt["prompt_token_ids"])
        for _ in range(how.max_tokens):
            logits = self.model(input_ids=torch.tensor([ids])).logits[0, -1]
            if how.allowed_token_ids is not None:
                allowed = torch.zeros(len(logits), dtype=torch.bool)
                allowed[how.allowed_token_ids] = True
                logits = logits.masked_fill(~allowed, -torch.inf)
            if how.temperature == 0:
                ids.append(int(logits.argmax()))
            else:
                chances = (logits / how.temperature).softmax(-1)
                ids.append(int(torch.multinomial(chances, 1, generator=generator)))
            if ids[-1] in how.stop_token_ids:
                break
        return ids[len(prompt["prompt_token_ids"]) :]


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `import vllm` find the double."""
    modules = {
        "vllm": {"LLM": LLM, "SamplingParams": SamplingParams},
        "vllm.distributed": {},
        "vllm.distributed.weight_transfer": {
            "HTTPVLLMWeightSyncClient": lambda address: address,
            "ModuleSource": lambda module: module,
            "WeightTransferTrainerFactory": Transfer,
        },
        "vllm.distributed.weight_transfer.nccl_engine": {"NCCLTrainerInitInfo": SimpleNamespace},
        "vllm.utils": {},
        "vllm.utils.network_utils": {
            "get_ip": lambda: "127.0.0.1",
            "get_open_port": lambda: 29555,
        },
    }
    for name, content in modules.items():
        fake = ModuleType(name)
        fake.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(fake).update(content)
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    LLM.made.clear()


class Transfer:
    """Sends weights to the server in this process, where the original uses NCCL."""

    def __init__(self, server: Server, source: Any) -> None:
        self.server, self.source = server, source

    @classmethod
    def trainer_init(cls, init_info: Any, client: str, source: Any) -> Transfer:
        server = Server.running[client]
        assert (init_info.rank, init_info.world_size) == (0, 1 + Server.WORKERS)
        return cls(server, source)

    def send_weights(self) -> None:
        self.server.engine.apply_model(
            lambda model: model.load_weights(self.source.named_parameters())
        )


class Server(ThreadingHTTPServer):
    """The endpoints of `vllm serve` that the backend calls."""

    WORKERS = 2
    running: ClassVar[dict[str, Server]] = {}

    def __init__(self, folder: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.engine = LLM(folder, load_format="dummy", seed=0)
        self.seen: list[dict[str, Any]] = []

    def answer(self, path: str, content: dict[str, Any]) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "the-student"}]}
        if path == "/get_world_size":
            return {"world_size": self.WORKERS}
        if path == "/reset_prefix_cache":
            self.engine.reset_prefix_cache()
            return None
        assert path == "/v1/completions"
        assert content["model"] == "the-student"
        assert content["return_token_ids"]
        assert content["repetition_penalty"] == 1.0
        assert not self.engine.stale
        self.seen.append(content)
        how = SimpleNamespace(allowed_token_ids=None)
        vars(how).update(content)
        ids = self.engine.text({"prompt_token_ids": content["prompt"]}, how)
        return {"choices": [{"token_ids": ids, "finish_reason": "stop"}]}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, content: dict[str, Any]) -> None:
        try:
            found, status = self.server.answer(self.path, content), 200
        except Exception as error:
            found, status = {"error": repr(error)}, 400
        self.send_response(status)
        self.end_headers()
        self.wfile.write(b"" if found is None else json.dumps(found).encode())

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def running_server(folder: str) -> Iterator[Server]:
    """A server for the checkpoint in a folder, until the context ends."""
    with Server(folder) as server:
        Server.running[server.address] = server
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
