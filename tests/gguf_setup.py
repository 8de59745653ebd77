"""A tiny Llama as a GGUF file, with its tokenizer and chat template, and the model itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_distill.models.from_scratch import train_tokenizer

FILE = "tiny.gguf"
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
HEADS, GROUPS = 4, 2
VOCABULARY = 280
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(folder: Path, texts: list[str], layers: int = 3) -> Any:
    """Write `folder/tiny.gguf` in float32; returns the model and the tokenizer that it holds.

    Skips the test without the package `gguf`.
    """
    gguf = pytest.importorskip("gguf", reason="GGUF files are written with the package gguf")
    tokenizer = train_tokenizer(texts, VOCABULARY)
    tokenizer.chat_template = TEMPLATE
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24,
                num_hidden_layers=layers, num_attention_heads=HEADS, num_key_value_heads=GROUPS,
                max_position_embeddings=64,
                bos_token_id=0, eos_token_id=0, pad_token_id=1, initializer_range=0.3,
            )
        ).eval()  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(folder / FILE), "llama")
    _write_settings(writer, model.config)
    _write_tokenizer(writer, tokenizer, gguf)
    for name, weight in _tensors(model).items():
        writer.add_tensor(name, weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, tokenizer


def _write_settings(writer: Any, config: LlamaConfig) -> None:
    writer.add_name("A tiny Llama")  # which transformers leaves in the config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _write_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerFast, gguf: Any) -> None:
    ids = {index: token for token, index in tokenizer.get_vocab().items()}
    special = set(tokenizer.all_special_ids)
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([ids[index] for index in range(len(ids))])
    writer.add_token_types(
        [kinds.CONTROL if index in special else kinds.NORMAL for index in range(len(ids))]
    )
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(1)
    writer.add_chat_template(TEMPLATE)


def _tensors(model: LlamaForCausalLM) -> dict[str, Tensor]:
    found = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output_norm.weight": model.model.norm.weight,
        "output.weight": model.lm_head.weight,
    }
    for index, block in enumerate(model.model.layers):
        for ours, theirs in NAMES.items():
            weight = block.get_submodule(ours).weight
            heads = {"attn_q": HEADS, "attn_k": GROUPS}.get(theirs)
            if heads:  # llama.cpp rotates pairs of neighbours instead of halves
                halves = weight.unflatten(0, (heads, 2, -1))
                weight = halves.transpose(1, 2).flatten(0, 2).contiguous()
            found[f"blk.{index}.{theirs}.weight"] = weight
    return found
