"""Pairs of models with features to compare, and the feature losses by loops over single rows."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "tasks"))
from task_models import collate, make_model, make_rows

from hf_distill import DistillationArguments, DistillationTrainer

# Student: 2 layers of width 16. Teacher: 4 layers, of width 24 where it is to be wider.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "Bert": (
        {"num_hidden_layers": 2},
        {"num_hidden_layers": 4},
        {"hidden_size": 24},
    ),
    "GPT2": ({"n_layer": 2}, {"n_layer": 4}, {"n_embd": 24}),
    "T5": (
        {"num_layers": 2, "num_decoder_layers": 2},
        {"num_layers": 4, "num_decoder_layers": 4},
        {"d_model": 24, "d_kv": 12},
    ),
}
TASKS = {"Bert": "sequence-classification", "GPT2": "causal-lm", "T5": "seq2seq-lm"}


def pair(name: str, *, wider: bool = True, **student: Any) -> tuple[Any, Any]:
    """A student and a teacher in float64."""
    ours, theirs, wide = SIZES[name]
    config = theirs | (wide if wider else {})
    small = make_model(name, TASKS[name], seed=1, **ours, **student)
    large = make_model(name, TASKS[name], seed=2, **config)
    for model in (small, large):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.div_(2 if parameter.dim() > 1 else 1)  # states of moderate size
    return small.double(), large.double()


def trainer_of(
    name: str, folder: Path, features: Any, models: tuple[Any, Any], **options: Any
) -> DistillationTrainer:
    arguments = {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 3,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    rows = make_rows(TASKS[name], 8)
    more = {k: options.pop(k) for k in ("peft_config", "optimizers") if k in options}
    return DistillationTrainer(
        models[0],
        models[1],
        DistillationArguments(str(folder), features=features, **(arguments | options)),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collate,
        **more,
    )


# ---- The feature losses in another way: each row alone, without padding, position by position ----


def by_hand(
    kind: str,
    models: tuple[Any, Any],
    pairs: list[tuple[int, int]],
    side: str,
    name: str,
    **more: Any,
) -> Tensor:
    """The mean over all positions of all rows; carries the gradient of the student."""
    total, positions = torch.zeros((), dtype=torch.float64), 0
    for row in make_rows(TASKS[name], 8):
        ours, theirs = (states(model, name, row, side) for model in models)
        if not ours:
            continue
        length = len(ours["hidden"][0])
        positions += length
        for student, teacher in pairs:
            for t in range(length):
                value = at_position(kind, ours, theirs, student, teacher, t, **more)
                total = total + value / len(pairs)
    return total / positions


def at_position(
    kind: str, ours: Any, theirs: Any, student: int, teacher: int, t: int,
    projection: Tensor | None = None, heads: int = 2,
) -> Tensor:  # fmt: skip
    if kind in ("hidden_cosine", "hidden_mse", "embeddings"):
        offset = 0 if kind == "embeddings" else 1
        a, b = ours["hidden"][offset + student][t], theirs["hidden"][offset + teacher][t].detach()
        if projection is not None:
            a = projection @ a
        if kind == "hidden_cosine":
            return 1 - (a @ b) / (a.norm() * b.norm())
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)
    if kind == "attention":
        a, b = ours["maps"][student], theirs["maps"][teacher].detach()
        return sum(kl(b[h][t], a[h][t]) for h in range(len(a))) / len(a)
    value = torch.zeros((), dtype=torch.float64)
    for part in range(3):
        a, b = ours["qkv"][student][part], theirs["qkv"][teacher][part].detach()
        for head in range(heads):
            value = value + kl(relation(b, t, head, heads), relation(a, t, head, heads)) / heads
    return value


def relation(x: Tensor, t: int, head: int, heads: int) -> Tensor:
    """(positions,), by the definition of a softmax."""
    width = x.shape[-1] // heads
    part = x[:, head * width : (head + 1) * width]
    scores = torch.stack([(part[t] @ part[s]) / math.sqrt(width) for s in range(len(x))])
    return scores.exp() / scores.exp().sum()


def kl(p: Tensor, q: Tensor) -> Tensor:
    terms = [a * (a / b).log() for a, b in zip(p, q, strict=True) if a > 0]
    return torch.stack(terms).sum()


def states(model: Any, name: str, row: Mapping[str, Any], side: str) -> dict[str, Any]:
    """What the model itself returns of one row, and queries, keys and values by its weights.

    hidden: [input of the first layer, output of each], (positions, width) each
    maps: by layer, (heads, positions, positions); qkv: by layer, three of (positions, width)
    side: "" or, of an encoder-decoder, "encoder" or "decoder"
    """
    model.set_attn_implementation("eager")
    inputs = {"input_ids": torch.tensor([row["input_ids"]])}
    if name == "T5":
        labels = [label for label in row["labels"] if label != -100]
        if not labels and side == "decoder":
            return {}
        decoder = model.prepare_decoder_input_ids_from_labels(torch.tensor([labels or [2]]))
        inputs["decoder_input_ids"] = decoder
    last: list[Tensor] = []
    blocks = {
        "Bert": lambda: model.bert.encoder.layer,
        "GPT2": lambda: model.transformer.h,
        "T5": lambda: model.get_submodule(side).block,
    }[name]()

    def keep(_: Any, args: Any, output: Any) -> None:
        last.append(output[0] if isinstance(output, tuple) else output)

    handle = blocks[-1].register_forward_hook(keep)  # later norms are no part of the layer
    options = {"use_cache": False} if name != "Bert" else {}
    out = model(**inputs, **options, output_hidden_states=True, output_attentions=True)
    handle.remove()
    prefix = f"{side}_" if side else ""
    hidden = [h[0] for h in out[f"{prefix}hidden_states"][:-1]] + [last[0][0]]
    maps = [a[0] for a in out[f"{prefix}attentions"]]
    qkv = [_qkv(name, block, hidden[i]) for i, block in enumerate(blocks)]
    return {"hidden": hidden, "maps": maps, "qkv": qkv}


def _qkv(name: str, block: Any, x: Tensor) -> list[Tensor]:
    if name == "Bert":
        attention = block.attention.self
        return [attention.query(x), attention.key(x), attention.value(x)]
    if name == "GPT2":
        found = block.ln_1(x) @ block.attn.c_attn.weight + block.attn.c_attn.bias
        return list(found.split(x.shape[-1], dim=-1))
    first = block.layer[0]
    x = first.layer_norm(x)
    attention = first.SelfAttention
    return [attention.q(x), attention.k(x), attention.v(x)]
