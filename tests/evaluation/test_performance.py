"""Size, speed and memory of models whose figures can be worked out by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from hf_distill.errors import InputError
from hf_distill.evaluation import performance as measure
from hf_distill.evaluation import speed

# peft 0.21 asks for a property that transformers 5.23 has renamed.
PEFT_LAGS = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def test_size_counts_tied_weights_once(tiny_gpt2: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_gpt2()
    width, vocabulary, positions = 16, 300, 64
    layer = 12 * width**2 + 13 * width  # attention 4, MLP 8, their biases, two layer norms
    expected = vocabulary * width + positions * width + 2 * layer + 2 * width
    assert measure.size(model) == {"parameters": expected, "size_mb": 4 * expected / 1e6}
    half = measure.size_mb(model.to(torch.bfloat16))
    assert half == 2 * expected / 1e6
    model.save_pretrained(tmp_path)
    assert half <= measure.size_mb(tmp_path) < half + 0.01  # and the file's header


@PEFT_LAGS
def test_size_of_an_adapted_model_holds_the_adapter(tiny_gpt2: Callable[..., Any]) -> None:
    plain = measure.size(tiny_gpt2())["parameters"]
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    adapted = measure.size(get_peft_model(tiny_gpt2(), config))["parameters"]
    assert adapted - plain == 2 * 2 * (16 + 48)


def test_size_of_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no safetensors file"):
        measure.size_mb(tmp_path)


def test_peak_memory_is_weights_and_what_work_takes(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(max_position_embeddings=4096)
    weights = measure.size(model)["size_mb"]
    few, many = (measure.peak_memory_mb(model, tokens) for tokens in (128, 1024))
    assert few == measure.peak_memory_mb(model, 128)  # no noise
    cache = 2 * 2 * 8 * 4 / 1e6  # layers x (keys, values) x one head of 8 x float32, a token
    assert weights + 128 * cache < few
    assert many - few > (1024 - 128) * cache
    # The same weights in half the bytes take about half the memory.
    assert 0.4 < measure.peak_memory_mb(model.to(torch.bfloat16), 1024) / many < 0.75


def test_peak_memory_counts_what_is_held_together() -> None:
    own = torch.ones(1000)
    with measure._HeldBytes([own]) as held:
        view = own[:10]  # no new memory
        first = torch.zeros(256)
        first += 1
        del first
        second = torch.zeros(128)
        third = second.reshape(2, 64).double()
    assert view.shape == (10,)
    assert third.shape == (2, 64)
    assert held.peak == 128 * 4 + 128 * 8
    assert held.now == held.peak
    del second, third
    assert held.now == 0


def test_a_round_of_fixed_lengths(
    tiny_gpt2: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that runs a second a look, rates are the token counts."""
    clock = iter(range(10**6))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    asked: list[int] = []
    monkeypatch.setattr(speed, "generate", lambda model, prompt, new: asked.append(new))
    work, tokens = speed.writing(tiny_gpt2(), prompt_tokens=20, new_tokens=8)
    assert work()["prefill_tokens_per_s"] == 20
    assert tokens == 28
    assert asked == [2, 1, 8]
    assert speed.writing(tiny_gpt2())[1] == 64  # cut to the model's positions


def test_models_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    rates = {"slow": iter([1.0, 4.0, 2.0]), "fast": iter([8.0, 8.0, 8.0])}

    def work(name: str) -> dict[str, float]:
        called.append(name)
        return {"rate": next(rates[name])}

    works = {name: partial(work, name) for name in rates}
    found = speed.in_turn(works, rounds=3)
    assert called == ["slow", "fast"] * 3
    assert found["slow"] == {"rate": 2.0, "rate_spread": (4 - 1) / 2}
    assert found["fast"] == {"rate": 8.0, "rate_spread": 0.0}
    # A slow machine measures once, and does not know the spread.
    rates |= {name: iter([3.0, 3.0]) for name in rates}
    assert speed.in_turn(works, budget_s=0)["slow"] == {"rate": 3.0}


def test_decoding_counts_the_tokens_after_the_first(
    tiny_gpt2: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def generate(model: Any, prompt: torch.Tensor, new_tokens: int) -> None:
        nonlocal now
        now += 5 + 0.5 * new_tokens  # a prefill of 5 s, and two tokens a second

    monkeypatch.setattr(speed, "generate", generate)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now)
    monkeypatch.setattr(speed, "_prefill", lambda model, prompt: generate(model, prompt, -8))
    found = speed.writing(tiny_gpt2(), prompt_tokens=32, new_tokens=16)[0]()
    assert found["decode_tokens_per_s"] == pytest.approx(2)
    assert found["prefill_tokens_per_s"] == pytest.approx(32)


@PEFT_LAGS
@pytest.mark.parametrize("adapted", [False, True])
def test_speed_of_real_models(tiny_llama: Callable[..., Any], adapted: bool) -> None:
    model = tiny_llama()
    if adapted:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).eval()
    model.generation_config.eos_token_id = list(range(299))  # yet no early end
    before = torch.random.get_rng_state()
    found = measure.costs({"": model}, writes=True, rounds=1)[""]
    assert torch.equal(before, torch.random.get_rng_state())
    assert found.keys() == {"prefill_tokens_per_s", "decode_tokens_per_s", "peak_memory_mb"}
    assert 10 < found["decode_tokens_per_s"] < found["prefill_tokens_per_s"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems give memory back by themselves")
def test_free_memory_goes_back_to_the_system() -> None:
    memory = measure.PeakMemory()
    many = [bytearray(10_000) for _ in range(20_000)]
    last = many.pop()  # the heap's top, under which nothing is given back by itself
    many.clear()
    held = memory.now()
    measure.give_back_memory()
    assert held - memory.now() > 150e6
    del last


@pytest.mark.parametrize("kind", ["bart", "gpt2"])
def test_classifiers_that_read_the_end_of_a_text(kind: str) -> None:
    """BART refuses rows with unlike ends; an id above the last would be out of range."""
    if kind == "bart":
        config: Any = BartConfig(
            vocab_size=12, d_model=8, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8,
            decoder_ffn_dim=8, encoder_attention_heads=1, decoder_attention_heads=1,
            pad_token_id=11, eos_token_id=2, max_position_embeddings=40,
        )  # fmt: skip
        model: Any = BartForSequenceClassification(config)
    else:
        config = GPT2Config(
            vocab_size=12, n_embd=8, n_layer=1, n_head=1, n_positions=40, pad_token_id=11,
            eos_token_id=11,
        )  # fmt: skip
        model = GPT2ForSequenceClassification(config)
    work, _ = speed.reading(model.eval())
    assert work()["examples_per_s"] > 0
