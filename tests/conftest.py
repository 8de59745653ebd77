"""What every test may use: no network, a tiny tokenizer, tiny models, the real text if present."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels run on the CPU

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

TEXT = (
    "def add(first, second):\n    return first + second\n",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "It is a truth universally acknowledged, that a single man must be in want of a wife.",
    "for row in rows:\n    if row is not None:\n        print(row)\n",
)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 tokens: <|endoftext|> (0) and <pad> (1), the bytes, a few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def tiny_gpt2() -> Callable[..., GPT2LMHeadModel]:
    """tiny_gpt2(seed=0, vocab_size=300, ...): a GPT-2 of 2 layers and width 16, in eval mode."""

    def make(seed: int = 0, **overrides: Any) -> GPT2LMHeadModel:
        set_seed(seed)
        shape = {"vocab_size": 300, "n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 64}
        special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
        return GPT2LMHeadModel(GPT2Config(**(shape | special | overrides))).eval()

    return make


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """tiny_llama(seed=0, vocab_size=300, ...): a Llama of 2 layers and width 16, in eval mode."""

    def make(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
        set_seed(seed)
        shape = {
            "vocab_size": 300,
            "num_hidden_layers": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
        }
        special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
        return LlamaForCausalLM(LlamaConfig(**(shape | special | overrides))).eval()

    return make


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real text ($HF_DISTILL_DATA, default ../shared/data); skips where absent."""
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("HF_DISTILL_DATA", root.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real text not found at {folder}: set HF_DISTILL_DATA")
    return folder


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)
