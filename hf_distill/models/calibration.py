"""Run a model on a few hundred rows, to measure its layers and units, and its perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.errors import InputError
from hf_distill.losses.targets import IGNORE
from hf_distill.models.heads import has_head
from hf_distill.models.layer_selection import Stack
from hf_distill.models.runner import ModelRunner

Row: TypeAlias = Mapping[str, Any] | str
# Columns of a row with one value for each of its tokens.
BY_TOKEN = ("input_ids", "token_type_ids", "position_ids")


@dataclass(frozen=True)
class CalibrationRow:
    """One row without padding.

    inputs: the keywords of a forward, int64 tensors (1, positions)
    labels: (positions,), the id that the logits of each position predict; None for other models
        than causal and encoder-decoder language models
    """

    inputs: dict[str, Tensor]
    labels: Tensor | None


def calibration_rows(
    model: PreTrainedModel,
    rows: Iterable[Row] | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[CalibrationRow]:
    """Rows as inputs of the model's forward; each runs alone, so that none is padded.

    rows: texts, or mappings with `input_ids`; perhaps with `attention_mask`, whose zeros are left
        out, `labels`, `token_type_ids` and `position_ids`. An encoder-decoder needs `labels`
    tokenizer: for texts
    raises: InputError where there are no rows, or a row does not fit the model
    """
    if rows is None:
        raise InputError("the teacher's layers and units are measured on rows of text: give rows")
    if isinstance(rows, str):
        raise InputError("rows is one text, but must be a list: give a few hundred rows")
    runner = ModelRunner(model, "teacher", outcomes=0, fused=False)
    found = [_calibration_row(runner, _tokenized(row, tokenizer, model)) for row in rows]
    if not found:
        raise InputError("rows is empty, so nothing can be measured: give a few hundred rows")
    return found


@torch.no_grad()
def run(model: PreTrainedModel, rows: Iterable[CalibrationRow]) -> float | None:
    """Run the model on every row, in evaluation mode.

    returns: perplexity over all labels; None where rows have none
    """
    losses, targets, training = 0.0, 0, model.training
    model.eval()
    try:
        for row in rows:
            logits = model(**row.inputs).logits
            if row.labels is not None:
                losses += F.cross_entropy(logits[0].float(), row.labels, reduction="sum").item()
                targets += int((row.labels != IGNORE).sum())
    finally:
        model.train(training)
    if not targets:
        return None
    mean = losses / targets
    return math.exp(mean) if mean < 700 else math.inf  # beyond it exp overflows


class BlockInfluence:
    """Measures how much each layer changes the direction of its hidden states on some rows.

    The block influence of a layer is 1 - mean cosine(hidden state in, hidden state out), over all
    positions of all rows. Source: ShortGPT, arXiv:2403.03853.
    """

    def __init__(self, model: PreTrainedModel, stacks: Iterable[Stack]) -> None:
        self._model, self._stacks = model, list(stacks)
        self._sums = {s: torch.zeros(s.length, dtype=torch.float64) for s in self._stacks}
        self._counts = {s: torch.zeros(s.length, dtype=torch.float64) for s in self._stacks}

    @property
    def scores(self) -> dict[Stack, list[float]]:
        """The influence of each layer, from 0 to 2."""
        return {s: (1 - self._sums[s] / self._counts[s]).tolist() for s in self._stacks}

    @contextmanager
    def measured(self) -> Iterator[None]:
        """A context in which every forward of the model counts."""
        handles = [
            block.register_forward_hook(self._counting(stack, index), with_kwargs=True)
            for stack in self._stacks
            for index, block in enumerate(_blocks(self._model, stack))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _counting(self, stack: Stack, index: int) -> Any:
        def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            before = args[0] if args else kwargs.get("hidden_states")
            after = out if isinstance(out, Tensor) else out[0]
            if not isinstance(before, Tensor) or before.shape != after.shape:
                raise InputError(
                    f"layer {index} of the teacher's {stack.name} does not map hidden states to "
                    "hidden states, so its influence cannot be measured: choose layers by another "
                    "rule"
                )
            exact = torch.promote_types(before.dtype, torch.float32)
            cosines = F.cosine_similarity(before.to(exact), after.to(exact), dim=-1)
            self._sums[stack][index] += cosines.double().sum().item()
            self._counts[stack][index] += cosines.numel()

        return count


def _blocks(model: PreTrainedModel, stack: Stack) -> Any:
    return model.get_submodule(stack.path)


def _tokenized(
    row: Row, tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel
) -> Mapping[str, Any]:
    if not isinstance(row, str):
        if "input_ids" not in row:
            raise InputError(
                f"a row has {', '.join(map(repr, row)) or 'no columns'}, but not 'input_ids': "
                "tokenize the rows, or give texts and a tokenizer"
            )
        return row
    if tokenizer is None:
        raise InputError("rows are texts, which need a tokenizer: give tokenizer")
    if has_head(model, "seq2seq-lm"):
        raise InputError(
            "rows are texts, but an encoder-decoder needs targets too: give tokenized rows with "
            "'input_ids' and 'labels'"
        )
    return tokenizer(row, truncation=tokenizer.model_max_length < 10**9)


def _calibration_row(runner: ModelRunner, row: Mapping[str, Any]) -> CalibrationRow:
    model = runner.model
    ids = torch.as_tensor(row["input_ids"], dtype=torch.long)
    if ids.dim() != 1 or not len(ids):
        raise InputError(
            f"a row's input_ids have the shape {tuple(ids.shape)}, but should be one token or more "
            "in a list: give rows, not batches"
        )
    mask, labels = row.get("attention_mask"), row.get("labels")
    kept = torch.ones_like(ids) if mask is None else torch.as_tensor(mask, dtype=torch.long)
    inputs = {
        name: torch.as_tensor(row[name], dtype=torch.long)[kept != 0][None]
        for name in BY_TOKEN
        if row.get(name) is not None
    }
    if has_head(model, "seq2seq-lm"):
        if labels is None:
            raise InputError("a row of an encoder-decoder has no 'labels': give its target's ids")
        labels = torch.as_tensor(labels, dtype=torch.long)
        labels = labels[labels != IGNORE]
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels[None])
    elif has_head(model, "causal-lm") and not has_head(model, "masked-lm"):
        labels = ids if labels is None else torch.as_tensor(labels, dtype=torch.long)
        labels = F.pad(labels[kept != 0][1:], (0, 1), value=IGNORE)
    else:
        labels = None
    on_device = {name: value.to(model.device) for name, value in inputs.items()}
    ready = runner.inputs(on_device) | runner.options
    return CalibrationRow(ready, None if labels is None else labels.to(model.device))
