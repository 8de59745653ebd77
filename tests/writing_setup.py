"""Tiny models that write, and their tokenizer, for tests of pipelines and annotation."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from conftest import TEXT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

END, PAD, START = 0, 1, 2
CAUSAL, ENCODER_DECODER = ("gpt2", "llama"), ("t5", "bart", "marian")
_SPECIAL = {"eos_token_id": END, "pad_token_id": PAD, "bos_token_id": START}
_HALVES = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "max_position_embeddings": 40, "forced_eos_token_id": None, "decoder_start_token_id": START,
}  # fmt: skip
_SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 40},
    "llama": {
        "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 40,
    },
    "t5": {
        "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2,
        "decoder_start_token_id": START,
    },
    "bart": _HALVES,
    "marian": _HALVES,
}  # fmt: skip


@lru_cache
def spaced_words() -> PreTrainedTokenizerFast:
    """Words w3 to w299 of one token each, whose decoder removes the first space (SentencePiece)."""
    words = {"</s>": END, "<pad>": PAD, "<s>": START} | {f"▁w{i}": i for i in range(3, 300)}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", pad_token="<pad>", bos_token="<s>"
    )


@lru_cache
def tokenizer(*, ends: bool = True, positions: int = 40) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 tokens. ends: put the end-of-text token after each text, as T5 does."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["</s>", "<pad>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXT, trainer)
    if ends:
        made.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", END)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="</s>",
        pad_token="<pad>",
        bos_token="<s>",
        model_max_length=positions,
    )


def writer(kind: str, seed: int = 1, **overrides: Any) -> PreTrainedModel:
    """A model with weights large enough that its texts depend on the source.

    Those with a bias of their logits (BART, Marian) end texts early.
    """
    torch.manual_seed(seed)
    shape = {"vocab_size": 300} | _SHAPES[kind] | _SPECIAL | overrides
    config = AutoConfig.for_model(kind, **shape)
    auto: Any = AutoModelForCausalLM if kind in CAUSAL else AutoModelForSeq2SeqLM
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias[0, END] = 5.0
    return model
