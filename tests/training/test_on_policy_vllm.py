"""Writing with vLLM, for which a double stands in: an engine with weights of its own.

The double has the documented interface that the backend uses. vLLM itself is not run here.
"""

from __future__ import annotations

import importlib.machinery
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from on_policy_setup import make, written_rows
from peft import LoraConfig, get_peft_model
from trainer_setup import collate, make_rows, small_model, weights
from transformers import AutoConfig, AutoModelForCausalLM

from hf_distill.errors import InputError


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


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType("vllm")
    fake.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    vars(fake).update(LLM=LLM, SamplingParams=SamplingParams)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    LLM.made.clear()


def student(kind: str) -> Any:
    model = small_model(0)
    if kind == "full":
        return model
    torch.manual_seed(3)
    lora = LoraConfig(
        r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True,
        modules_to_save=["ln_f"] if kind == "lora and norm" else None,
    )  # fmt: skip
    return get_peft_model(model, lora)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", ["full", "lora", "lora and norm"])
def test_greedy_text_is_that_of_generate_in_every_step(kind: str, tmp_path: Path) -> None:
    options = {"on_policy": 0.6, "sampling_temperature": 0.0, "max_steps": 3, "optim": "sgd"}
    options |= {"learning_rate": 0.5, "lr_scheduler_type": "constant"}
    found = []
    for backend in ("generate", "vllm"):
        trainer = make(tmp_path, model=student(kind), writing_backend=backend, **options)
        before = {name: value.clone() for name, value in weights(trainer).items()}
        trainer.train()
        found.append((written_rows(trainer.seen), weights(trainer)))
        frozen = {n for n, p in trainer.model.named_parameters() if not p.requires_grad}
        for name in frozen:  # merging leaves no rounding error in them
            assert torch.equal(before[name], weights(trainer)[name])
    assert found[0][0] == found[1][0]
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, rtol=1e-4, atol=1e-6)
    assert len(LLM.made) == 1
    assert len(LLM.made[0].asked) == 3


def test_draws_follow_from_seed_step_and_prompt(tmp_path: Path) -> None:
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        trainer = make(
            tmp_path, on_policy=0.7, max_steps=2, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation, writing_backend="vllm",
        )  # fmt: skip
        trainer.train()
        found.append(sorted(map(str, written_rows(trainer.seen)[:8])))
    assert found[0] == found[1]
    seeds = [how.seed for asked in LLM.made[0].asked for how in asked]
    assert len(set(seeds)) == len(seeds) > 8


def test_random_states_are_as_before(tmp_path: Path) -> None:
    trainer = make(tmp_path, on_policy=1.0, max_steps=1, writing_backend="vllm")
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    trainer.state.max_steps = 1
    assert trainer._writer.write([collate(make_rows(4, 1))])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_unshared_ids_are_never_written(tmp_path: Path) -> None:
    teacher = small_model(1, vocab_size=20)
    rows = [
        {name: [i % 18 + 2 for i in ids] for name, ids in row.items()} for row in make_rows(8, 0)
    ]
    trainer = make(
        tmp_path, teacher=teacher, rows=rows, on_policy=1.0, max_steps=1, writing_backend="vllm",
        vllm_memory=0.2,
    )  # fmt: skip
    trainer.train()
    assert LLM.made[0].options["gpu_memory_utilization"] == 0.2
    assert LLM.made[0].asked[0][0].allowed_token_ids == list(range(20))
    assert all(token < 20 for row in written_rows(trainer.seen) for token in row["input_ids"])


def test_what_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="writing_backend is x, but must be one of generate"):
        make(tmp_path, writing_backend="x")
    quantised = make(tmp_path, on_policy=1.0, writing_backend="vllm")
    quantised.model.is_quantized = True
    with pytest.raises(InputError, match="the student is quantised"):
        quantised.train()
    with pytest.raises(InputError, match="teacher_mix runs the teacher at every generated token"):
        make(tmp_path, on_policy=1.0, writing_backend="vllm", teacher_mix=0.2).train()
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match="vllm is not installed"):
        make(tmp_path, on_policy=1.0, writing_backend="vllm").train()
