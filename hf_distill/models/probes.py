"""Find facts about a model by a forward pass over a few tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_distill.models.positions import PositionCounter
from hf_distill.models.vocabulary import embedding_rows

TOKENS = 6


@torch.no_grad()
def ignores_padding(model: PreTrainedModel) -> bool:
    """Whether padding on the left changes the logits of the tokens after it.

    True for models that ignore the attention mask or take none (RWKV, CPM-Ant). False if the probe
    itself fails.
    """
    try:
        with _evaluating(model):
            ids = _ids(model)
            plain = model(input_ids=ids, use_cache=False).logits
            padded = torch.nn.functional.pad(ids, (2, 0), value=_padding(model))
            mask = torch.nn.functional.pad(torch.ones_like(ids), (2, 0))
            inputs = {"input_ids": padded}
            if "attention_mask" in inspect.signature(model.forward).parameters:
                inputs["attention_mask"] = mask
            counter = PositionCounter(model)
            if counter.applies:
                inputs["position_ids"] = counter(mask)
            found = model(**inputs, use_cache=False).logits
            shifted = found if found.shape == plain.shape else found[:, 2:]
    except Exception:
        return False
    return _differ(shifted.float(), plain.float(), 2e-2 if plain.dtype.itemsize < 4 else 1e-3)


@torch.no_grad()
def added_loss(model: PreTrainedModel) -> tuple[float, float | None]:
    """The loss that a model's forward adds to its cross-entropy, and its auxiliary loss.

    The model's own loss function is replaced by zero for one forward with labels. What remains is
    added by the forward itself, such as the load-balancing loss of a mixture of experts.
    returns: what it adds, and `outputs.aux_loss`, None where there is none; (0, None) for a model
        that computes its loss in another way, or whose probe fails
    """
    called: list[bool] = []

    def zero(logits: Tensor, *_: Any, **__: Any) -> Tensor:
        called.append(True)
        return logits.new_zeros((), dtype=torch.float32)

    name = "_loss_function"
    kept = vars(model).get(name)
    try:
        with _evaluating(model):
            ids = _ids(model)
            model.loss_function = zero
            outputs = model(input_ids=ids, labels=ids, use_cache=False)
    except Exception:
        return 0.0, None
    finally:
        vars(model).pop(name, None)
        if kept is not None:
            vars(model)[name] = kept
    if not called:
        return 0.0, None
    auxiliary = getattr(outputs, "aux_loss", None)
    return float(outputs.loss), None if auxiliary is None else float(auxiliary)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode, without a trace in the modes of the model's modules."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _ids(model: PreTrainedModel) -> Tensor:
    vocabulary = embedding_rows(model)
    padding = _padding(model)
    ids = [i for i in range(2 * TOKENS) if i != padding][:TOKENS]
    return torch.tensor([ids], device=model.device) % max(vocabulary, 1)


def _padding(model: PreTrainedModel) -> int:
    found = getattr(model.config.get_text_config(), "pad_token_id", None)
    return found if isinstance(found, int) and found >= 0 else 0


def _differ(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() > tolerance * b.abs().max().clamp(min=1e-3))
