"""Writing with vLLM, for which a double stands in: an engine or a server with its own weights.

vLLM itself is not run here.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from on_policy_setup import make, written_rows
from peft import LoraConfig, get_peft_model
from trainer_setup import collate, make_rows, small_model, weights
from vllm_double import LLM, install, running_server

from hf_distill.errors import InputError


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def low_rows() -> list[dict[str, list[int]]]:
    """Rows of ids below 20."""
    return [
        {name: [i % 18 + 2 for i in ids] for name, ids in row.items()} for row in make_rows(8, 0)
    ]


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


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", ["full", "lora and norm"])
def test_a_server_writes_greedily_as_generate_does(kind: str, tmp_path: Path) -> None:
    options = {"on_policy": 0.6, "sampling_temperature": 0.0, "max_steps": 3, "optim": "sgd"}
    options |= {"learning_rate": 0.5, "lr_scheduler_type": "constant"}
    small_model(0).config.save_pretrained(tmp_path / "checkpoint")
    with running_server(str(tmp_path / "checkpoint")) as server:
        served = {"writing_backend": "vllm", "vllm_server": server.address + "/"}
        found = []
        for how in ({}, served):
            trainer = make(tmp_path, model=student(kind), **how, **options)
            trainer.train()
            found.append((written_rows(trainer.seen), weights(trainer)))
    assert found[0][0] == found[1][0]
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, rtol=1e-4, atol=1e-6)
    assert len(server.seen) >= 3


def test_requests_to_a_server(tmp_path: Path) -> None:
    small_model(0).config.save_pretrained(tmp_path / "checkpoint")
    with running_server(str(tmp_path / "checkpoint")) as server:
        options = {"on_policy": 1.0, "max_steps": 2, "top_p": 0.9, "max_new_tokens": 3}
        trainer = make(
            tmp_path, teacher=small_model(1, vocab_size=20), writing_backend="vllm",
            vllm_server=server.address, rows=low_rows(), **options,
        )  # fmt: skip
        trainer.train()
        asked = server.seen
        assert {one["top_p"] for one in asked} == {0.9}
        assert {one["max_tokens"] for one in asked} == {3}
        assert all(one["allowed_token_ids"] == list(range(20)) for one in asked)
        assert len({one["seed"] for one in asked}) == len(asked) == 8
        server.engine.stale = True  # which the double answers with an error
        with pytest.raises(OSError, match="/v1/completions answers 400"):
            trainer._writer._backend()._call("/v1/completions", {"model": "x"})


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
    trainer = make(
        tmp_path, teacher=teacher, rows=low_rows(), on_policy=1.0, max_steps=1,
        writing_backend="vllm", vllm_memory=0.2,
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
    with pytest.raises(InputError, match="vllm_server is localhost:8000, but must be an address"):
        make(tmp_path, vllm_server="localhost:8000")
    with pytest.raises(InputError, match="^writing_backend is generate, but must be vllm with a"):
        make(tmp_path, vllm_server="http://a")
    closed = {"writing_backend": "vllm", "vllm_server": "http://127.0.0.1:9"}
    with pytest.raises(InputError, match="http://127.0.0.1:9 does not answer as a server of vLLM"):
        make(tmp_path, on_policy=1.0, **closed).train()
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match="vllm is not installed"):
        make(tmp_path, on_policy=1.0, writing_backend="vllm").train()
