"""A tiny model of every architecture and task that the tests train, and rows for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers as hf
from torch import Tensor

VOCABULARY, CLASSES = 40, 5
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 1,
}
DISTILBERT = {
    "vocab_size": VOCABULARY, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24,
    "max_position_embeddings": 40, "dropout": 0.0, "attention_dropout": 0.0, "qa_dropout": 0.0,
    "seq_classif_dropout": 0.0, "pad_token_id": 1,
}  # fmt: skip
SPECIAL = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
BART = {
    "vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "max_position_embeddings": 40, "dropout": 0.0, "classifier_dropout": 0.0,
    "forced_eos_token_id": None, **SPECIAL,
}  # fmt: skip
T5 = {
    "vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1,
    "num_decoder_layers": 1, "num_heads": 2, "dropout_rate": 0.0, "pad_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 40,
    "pad_token_id": 1,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "pad_token_id": 1,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
MODERN = ENCODER | {
    "attention_dropout": 0.0, "mlp_dropout": 0.0, "embedding_dropout": 0.0,
    "classifier_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0,
    "sep_token_id": 2, "reference_compile": False,
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Bert": ("BertConfig", ENCODER),
    "Roberta": ("RobertaConfig", ENCODER),
    "DistilBert": ("DistilBertConfig", DISTILBERT),
    "DebertaV2": ("DebertaV2Config", ENCODER | {"pooler_hidden_size": 16}),
    "ModernBert": ("ModernBertConfig", MODERN),
    "GPT2": ("GPT2Config", GPT2),
    "Llama": ("LlamaConfig", DECODER),
    "Qwen2": ("Qwen2Config", DECODER),
    "T5": ("T5Config", T5),
    "Bart": ("BartConfig", BART),
    "Marian": ("MarianConfig", BART),
    "MBart": ("MBartConfig", BART),
}
CLASS_NAMES = {
    "causal-lm": ("ForCausalLM", "LMHeadModel"),
    "seq2seq-lm": ("ForConditionalGeneration", "MTModel"),
    "masked-lm": ("ForMaskedLM",),
    "sequence-classification": ("ForSequenceClassification",),
    "token-classification": ("ForTokenClassification",),
    "question-answering": ("ForQuestionAnswering",),
}


def cases() -> list[tuple[str, str]]:
    """Every architecture with every task that it has a class for."""
    found = []
    for name in CONFIGS:
        encoder_decoder = name in ("T5", "Bart", "Marian", "MBart")
        for task in CLASS_NAMES:
            if task == "causal-lm" and (encoder_decoder or name in ("Bert", "Roberta")):
                continue
            if _class(name, task) is not None:
                found.append((name, task))
    return found


def _class(name: str, task: str) -> Any:
    found = [getattr(hf, name + ending, None) for ending in CLASS_NAMES[task]]
    return next((kind for kind in found if kind is not None), None)


def make_model(name: str, task: str, seed: int = 0, **config: Any) -> Any:
    """A model with weights that are far from uniform predictions, in eval mode."""
    config_class, shape = CONFIGS[name]
    labels = {} if task.endswith("lm") or task == "question-answering" else {"num_labels": CLASSES}
    torch.manual_seed(seed)
    model = _class(name, task)(getattr(hf, config_class)(**(shape | labels | config)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.requires_grad:  # not Marian's sinusoids
                parameter.mul_(6.0)
        bias = getattr(model, "final_logits_bias", None)
        if bias is not None:
            bias.copy_(torch.randn_like(bias))
    return model.eval()


def make_rows(task: str, number: int = 8, seed: int = 3) -> list[dict[str, Any]]:
    """Rows of unequal length and with unequal numbers of targets, one of them without any."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    rows = []
    for index in range(number):
        length = 4 + (5 * index) % 7
        row: dict[str, Any] = {"input_ids": ids(length)}
        keep = torch.rand(length, generator=generator) < (0.5 if index != 2 else 0.0)
        if task in ("causal-lm", "masked-lm"):
            row["labels"] = [i if k else -100 for i, k in zip(row["input_ids"], keep, strict=True)]
        elif task == "token-classification":
            row["labels"] = [
                i % CLASSES if k else -100 for i, k in zip(ids(length), keep, strict=True)
            ]
        elif task == "seq2seq-lm":
            row["labels"] = [-100] if index == 2 else [*ids(1 + index % 4), 2]
        elif task == "sequence-classification":
            row["input_ids"][-1] = 2  # some models classify at the end-of-text token
            row["labels"] = index % CLASSES
        else:
            start = index % 3
            row |= {"start_positions": start, "end_positions": min(start + index % 2, length - 1)}
        rows.append(row)
    return rows


def collate(rows: list[Mapping[str, Any]], side: str = "right") -> dict[str, Tensor]:
    """Padded tensors; labels that are numbers of a row are stacked."""

    def pad(name: str, value: int, side: str = "right") -> Tensor:
        longest = max(len(row[name]) for row in rows)
        padded = []
        for row in rows:
            fill = [value] * (longest - len(row[name]))
            values = list(row[name])
            padded.append(values + fill if side == "right" else fill + values)
        return torch.tensor(padded)

    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    batch = {
        "input_ids": pad("input_ids", 1, side),
        "attention_mask": pad("attention_mask", 0, side),
    }
    for name in rows[0].keys() - batch.keys():
        if isinstance(rows[0][name], list):
            aligned = all(len(row[name]) == len(row["input_ids"]) for row in rows)
            batch[name] = pad(name, -100, side if aligned else "right")
        else:
            batch[name] = torch.tensor([row[name] for row in rows])
    if side == "left" and "start_positions" in batch:
        shift = (batch["attention_mask"] == 0).sum(-1)
        batch["start_positions"] = batch["start_positions"] + shift
        batch["end_positions"] = batch["end_positions"] + shift
    return batch
