"""A small pair, a few rows and quiet arguments, for the trainer's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer

from hf_distill import DistillationArguments

VOCABULARY = 40


def small_model(seed: int, architecture: str = "gpt2", layers: int = 1, **config: Any) -> Any:
    torch.manual_seed(seed)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "vocab_size": VOCABULARY}
    if architecture == "llama":
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(**(ids | shape | config), num_hidden_layers=layers))
    shape = {"n_embd": 16, "n_head": 2, "n_layer": layers, "n_positions": 32}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**(ids | shape | dropout | config)))
    with torch.no_grad():
        model.transformer.wte.weight.mul_(10)  # fresh weights are nearly uniform
    return model


def make_rows(number: int, seed: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(number):
        length = 3 + (7 * index) % 9
        ids = torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()
        masked = index % 3
        rows.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return rows


def collate(rows: list[dict[str, list[int]]], length: int | None = None) -> dict[str, Tensor]:
    def pad(name: str, value: int) -> Tensor:
        columns = [torch.tensor(row[name]) for row in rows]
        padded = pad_sequence(columns, True, value)
        extra = 0 if length is None else length - padded.shape[1]
        return torch.nn.functional.pad(padded, (0, extra), value=value)

    for row in rows:
        row["attention_mask"] = [1] * len(row["input_ids"])
    return {
        "input_ids": pad("input_ids", 1),
        "labels": pad("labels", -100),
        "attention_mask": pad("attention_mask", 0),
    }


def arguments(folder: Path, kind: Any = DistillationArguments, **options: Any) -> Any:
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    steps = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1}
    return kind(str(folder), **(quiet | steps | options))


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return dict(trainer.model.state_dict())
