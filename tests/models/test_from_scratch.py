"""From scratch: the tokenizer loses nothing, the model is what the config and the seed say."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import transformers as hf
from hypothesis import example, given, settings
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_distill.errors import InputError
from hf_distill.models import from_scratch as pretraining
from hf_distill.models.from_scratch import max_positions, model_from_config, train_tokenizer

TEXTS = tuple(
    path.read_text(encoding="utf-8")
    for path in sorted(Path(pretraining.__file__).parent.glob("*.py"))
)
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 320, model_max_length=32)


def test_vocabulary_is_as_large_as_asked() -> None:
    assert len(tokenizer()) == 320
    assert sorted(tokenizer().get_vocab().values()) == list(range(320))
    assert tokenizer().eos_token == tokenizer().bos_token == "<|endoftext|>"
    assert (tokenizer().eos_token_id, tokenizer().pad_token_id) == (0, 1)


def test_the_corpus_decides_the_merges() -> None:
    text = "raise InputError from error"
    others = train_tokenizer(["zzz qqq " * 50, "abab " * 50], 262)
    assert len(tokenizer()(text).input_ids) < len(others(text).input_ids) == len(text)
    assert len(others("zzz")["input_ids"]) < 3


@settings(max_examples=200, deadline=None)
@given(st.text())
@example("")
@example(" two  spaces \t\r\n\n")
@example("a <|endoftext|> b <|pad|>c")
@example("don ' t , . ! ?")
@example("\x00\x7f\ufeff\ufffd e\u0301 \u00e9 \u4e2d\u6587 \U0001f468\u200d\U0001f469")
def test_nothing_is_lost(text: str) -> None:
    ids = tokenizer()(text, add_special_tokens=True).input_ids
    assert tokenizer().decode(ids) == text


def test_text_gets_no_special_tokens_of_itself() -> None:
    assert not {0, 1} & set(tokenizer()("one\ntwo").input_ids)


def test_reload_changes_nothing(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer().get_vocab()
    assert (again.eos_token, again.bos_token, again.pad_token) == (
        *["<|endoftext|>"] * 2,
        "<|pad|>",
    )
    assert again.model_max_length == 32
    text = " größe , b .\n\tx"
    assert again(text).input_ids == tokenizer()(text).input_ids
    assert again.decode(again(text).input_ids) == text
    assert again(["a", text], padding=True).input_ids[0][-1] == again.pad_token_id


def test_training_again_gives_the_same_tokenizer() -> None:
    assert train_tokenizer(iter(TEXTS), 320).get_vocab() == tokenizer().get_vocab()


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        ([], 300, "no text"),
        (["", ""], 300, "no text"),
        (["abc abc"], 5000, "too small for a vocabulary of 5000 tokens, it gives 260"),
        (["abc abc"], 257, "vocab_size=257 cannot hold .* at least 258"),
    ],
)
def test_refused_corpora(texts: list[str], vocab_size: int, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        train_tokenizer(texts, vocab_size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "model_class"),
    [
        (GPT2, hf.GPT2LMHeadModel),
        (LLAMA, hf.LlamaForCausalLM),
        (LLAMA | {"model_type": "qwen3", "head_dim": 4}, hf.Qwen3ForCausalLM),
        (LLAMA | {"model_type": "mistral", "sliding_window": 8}, hf.MistralForCausalLM),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_model_fits_the_tokenizer(
    config: dict[str, Any], model_class: type, tmp_path: Path
) -> None:
    model = model_from_config(config, tokenizer(), seed=0, max_length=32)
    assert type(model) is model_class
    assert model.get_output_embeddings().weight.shape == (320, 16)
    for ids in (model.config, model.generation_config):
        assert (ids.bos_token_id, ids.eos_token_id, ids.pad_token_id) == (0, 0, 1)
    assert model.config.num_hidden_layers == 2
    model.eval().save_pretrained(tmp_path)
    batch = tokenizer()(["def f(x):"], return_tensors="pt")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert model.generate(**batch, max_new_tokens=3, do_sample=False).shape[0] == 1


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_the_seed_decides_the_weights_and_nothing_else_does(config: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    first = model_from_config(config, tokenizer(), seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    second = model_from_config(config, tokenizer(), seed=3).state_dict()
    other = model_from_config(config, tokenizer(), seed=4).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    embedding = next(key for key in first if first[key].shape == (320, 16))
    assert not torch.equal(first[embedding], other[embedding])


def test_names_that_the_model_type_understands_are_accepted() -> None:
    names = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = model_from_config(
        {"model_type": "gpt2", "max_position_embeddings": 16} | names, tokenizer(), seed=0
    )
    assert (model.config.n_embd, model.config.n_layer, model.config.n_positions) == (8, 1, 16)
    model = model_from_config(LLAMA | {"rope_theta": 5000.0}, tokenizer(), seed=0)
    assert model.config.rope_parameters["rope_theta"] == 5000.0
    model = model_from_config(GPT2 | {"vocab_size": 320, "eos_token_id": 0}, tokenizer(), seed=0)
    assert model.config.vocab_size == 320


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2 | {"n_layers": 3}, "'n_layers' is not a setting of gpt2.* 'n_layer'"),
        (GPT2 | {"num_hiden_layers": 3}, "'num_hiden_layers' .* 'num_hidden_layers'"),
        (LLAMA | {"hidden_sizes": 16}, "'hidden_sizes' .* 'hidden_size'"),
        (LLAMA | {"rope_teta": 5000.0}, "'rope_teta'"),
        (LLAMA | {"temperature": 2.0}, "'temperature' is not a setting"),
        (GPT2 | {"model_type": "llamma"}, "model_type='llamma' is no causal .*'llama'"),
        (GPT2 | {"model_type": "vit"}, "model_type='vit' is no causal language model"),
        ({"n_layer": 2}, "no model_type: .*gpt2 or llama"),
        (GPT2 | {"n_layer": "2"}, "gpt2 refuses its config .*n_layer"),
        (GPT2 | {"n_head": 3}, "divisible"),
        (GPT2 | {"n_head": 0}, "gpt2 refuses its config"),
        (LLAMA | {"num_key_value_heads": 3}, "llama refuses its config"),
        (GPT2 | {"vocab_size": 100}, "vocab_size=100 disagrees with the tokenizer's 320"),
        (GPT2 | {"pad_token_id": 0}, "pad_token_id=0 disagrees"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_configs(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        model_from_config(config, tokenizer(), seed=0)
    assert "\n" not in str(caught.value)


def test_an_encoder_decoder_without_its_task_is_told() -> None:
    config = {"model_type": "bart", "encoder_layers": 2, "decoder_layers": 3, "d_model": 16}
    config |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    message = "as a BartForCausalLM, the class for task='causal-lm' .* or pass task='seq2seq-lm'"
    with pytest.raises(InputError, match=message):
        model_from_config(config, tokenizer(), seed=0)
    made = model_from_config(config, tokenizer(), seed=0, task="seq2seq-lm")
    assert isinstance(made, hf.BartForConditionalGeneration)


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_rows_longer_than_the_positions_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="max_length=33 is beyond the 32 positions"):
        model_from_config(config, tokenizer(), seed=0, max_length=33)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (hf.GPT2Config(n_positions=48), 48),
        (hf.LlamaConfig(max_position_embeddings=64), 64),
        (hf.BartConfig(max_position_embeddings=80), 80),
        (hf.T5Config(), None),
        (hf.BloomConfig(), None),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_max_positions(config: hf.PreTrainedConfig, expected: int | None) -> None:
    assert max_positions(config) == expected


@pytest.mark.parametrize("model_type", ["marian", "bart"])
def test_a_text_at_the_length_limit_ends_with_the_tokenizers_end(model_type: str) -> None:
    tokenizer = train_tokenizer(TEXTS, 320, task="seq2seq-lm")
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16}
    sizes |= {"decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = {"model_type": model_type, "max_position_embeddings": 32} | sizes
    model = model_from_config(config, tokenizer, seed=0, task="seq2seq-lm")
    assert tokenizer.eos_token_id not in (0, None)
    source = tokenizer("a text", return_tensors="pt")
    written = model.generate(**source, max_new_tokens=3, do_sample=False)
    assert written[0, -1] == tokenizer.eos_token_id
