"""Prompts of held-out rows, and greedy continuations of them by several models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hf_distill.data import prompt_length
from hf_distill.errors import InputError
from hf_distill.evaluation.evaluate import as_they_were
from hf_distill.evaluation.speed import generate
from hf_distill.losses.targets import IGNORE
from hf_distill.models.from_scratch import max_positions


def split_row(
    row: Mapping[str, Any], prompt_tokens: int, reference_tokens: int | None = None
) -> tuple[list[int], list[int]]:
    """The prompt of a row, and the reference that follows it.

    row: `input_ids`, and perhaps `labels` (default: the ids) and `attention_mask`
    prompt_tokens, reference_tokens: most tokens of each, in a row of plain text
    returns: the ids before the first target (all ids if there is no target), and the first run of
        targets; in plain text, the beginning and the text after it
    """
    ids: Sequence[int] = row["input_ids"]
    labels, mask = row.get("labels"), row.get("attention_mask")
    labels, mask = ids if labels is None else labels, [1] * len(ids) if mask is None else mask
    ids, labels = ([x for x, seen in zip(of, mask, strict=True) if seen] for of in (ids, labels))
    plain = any(label != IGNORE for label in labels[:2])
    start = prompt_length(labels, prompt_tokens)
    targets = labels[start:]
    end = targets.index(IGNORE) if IGNORE in targets else len(targets)
    return ids[:start], targets[:end][: reference_tokens if plain else None]


@torch.no_grad()
def continuations(
    models: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int = 48,
) -> list[dict[str, str]]:
    """Greedy continuations of the same prompts by several models, side by side.

    models: by name; prompts: token ids
    max_new_tokens: reduced if a model has fewer positions left
    returns: for each prompt, `prompt` and each model's continuation of it, as text
    raises: InputError for a prompt that leaves a model no position at all
    """
    table = []
    with as_they_were(*models.values()):
        for prompt in prompts:
            ids = {"prompt": list(prompt)}
            for name, model in models.items():
                ids[name] = _continue(model.eval(), name, ids["prompt"], max_new_tokens)
            texts = (str(tokenizer.decode(i, skip_special_tokens=True)) for i in ids.values())
            table.append(dict(zip(ids, texts, strict=True)))
    return table


def _continue(model: Any, name: str, prompt: list[int], max_new_tokens: int) -> list[int]:
    limit = max_positions(model.config)
    if limit is not None and limit <= len(prompt):
        raise InputError(
            f"a prompt has {len(prompt)} tokens, but the {name} has only {limit} positions: "
            "cut the prompts shorter"
        )
    room = max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt))
    ids = torch.tensor([prompt], device=model.device)
    written = generate(model, ids, room, exactly=False)
    return written[0, len(prompt) :].tolist()
