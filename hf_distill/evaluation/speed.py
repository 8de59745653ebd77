"""Time several models fairly: one after the other in each round, several rounds, medians.

If other work runs on the machine for a while, it slows all models in the same rounds, and the
spread of the rounds shows it.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_distill.models.from_scratch import max_positions
from hf_distill.models.vocabulary import embedding_rows

PROMPT_TOKENS, NEW_TOKENS = 128, 64
EXAMPLES = 8
ROUNDS = 5
BUDGET_S = 30.0
"""After this many seconds for each model no further round begins."""

SPREAD = "_spread"
"""What the name of a speed's spread ends with."""

Rates = dict[str, float]


def in_turn(
    works: Mapping[str, Callable[[], Rates]], rounds: int = ROUNDS, budget_s: float = BUDGET_S
) -> dict[str, Rates]:
    """Call each function once per round.

    works: by name; each returns what it has measured, by key
    returns: by name, the median of each key over the rounds, and where there were several, under
        the key with `SPREAD` behind it, (largest - smallest) / median
    """
    started = time.perf_counter()
    found: dict[str, list[Rates]] = {name: [] for name in works}
    for number in range(rounds):
        if number and time.perf_counter() - started >= budget_s * len(works):
            break
        for name, work in works.items():
            found[name].append(work())
    return {name: _summary(measured) for name, measured in found.items()}


def spread_of(values: list[float]) -> float:
    """(largest - smallest) / median."""
    return (max(values) - min(values)) / statistics.median(values)


def _summary(rounds: list[Rates]) -> Rates:
    summary: Rates = {}
    for key in rounds[0]:
        values = [rates[key] for rates in rounds]
        summary[key] = statistics.median(values)
        if len(values) > 1:
            summary[key + SPREAD] = spread_of(values)
    return summary


def writing(
    model: Any, prompt_tokens: int = PROMPT_TOKENS, new_tokens: int = NEW_TOKENS
) -> tuple[Callable[[], Rates], int]:
    """The timing of a model that generates text, after a warm-up, and its number of tokens.

    The prompt is random ids, since the text makes no difference. Both lengths are cut to the
    model's positions. A round measures `prefill_tokens_per_s` (prompt tokens read, cache filled)
    and `decode_tokens_per_s` (tokens after the first, greedy, with the cache).
    """
    limit = max_positions(model.config) or prompt_tokens + new_tokens
    written = max(2, min(new_tokens, limit // 2))
    read = max(1, min(prompt_tokens, limit - written))
    prompt = random_prompt(model, read)

    def work() -> Rates:
        prefill_s = _seconds(model, lambda: _prefill(model, prompt))
        first_s = _seconds(model, lambda: generate(model, prompt, 1))
        whole_s = _seconds(model, lambda: generate(model, prompt, written))
        return {
            "prefill_tokens_per_s": read / prefill_s,
            "decode_tokens_per_s": (written - 1) / max(whole_s - first_s, 1e-9),
        }

    _prefill(model, prompt)
    generate(model, prompt, 2)
    return work, read + written


def reading(
    model: Any, tokens: int = PROMPT_TOKENS, examples: int = EXAMPLES
) -> tuple[Callable[[], Rates], Callable[[], None]]:
    """The timing of a model that does not generate text, after a warm-up; and one forward of it.

    tokens: of each example, cut to the model's positions; examples: read together
    A round measures `examples_per_s`.
    """
    # RoBERTa and its relatives reserve two positions.
    limit = max_positions(model.config) or tokens + 2
    ids = random_prompt(model, max(1, min(tokens, limit - 2)), rows=examples)

    def read() -> None:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))

    read()
    return lambda: {"examples_per_s": examples / _seconds(model, read)}, read


def random_prompt(model: Any, tokens: int, rows: int = 1) -> Tensor:
    """(rows, tokens) random ids, always the same.

    With several rows each ends as a text does, and has no padding: some classifiers read their
    class at the end of the text, and refuse rows without one.
    """
    generator = torch.Generator().manual_seed(0)  # the global random state stays as it is
    ids = torch.randint(embedding_rows(model), (rows, tokens), generator=generator)
    if rows > 1:
        config = model.config.get_text_config()
        ends, padding = config.eos_token_id, config.pad_token_id
        ends = [ends] if isinstance(ends, int) else ends or []
        marks = [*ends, *([] if padding is None else [padding])]
        word = next(i for i in range(len(marks) + 1) if i not in marks)
        ids[torch.isin(ids, torch.tensor(marks, dtype=torch.int64))] = word
        if ends:
            ids[:, -1] = ends[0]
    return ids.to(model.device)


def generate(model: Any, prompt: Tensor, new_tokens: int, *, exactly: bool = True) -> Tensor:
    """Generate tokens after one prompt, greedily, with the cache; returns prompt and new tokens.

    exactly: generate this many, also after the end of the text; otherwise at most this many
    """
    written: Tensor = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        synced_gpus=False,  # the model is whole here, or all processes run it alike
        num_beams=1,
        use_cache=True,
        min_new_tokens=new_tokens if exactly else None,
        max_new_tokens=new_tokens,
        pad_token_id=0,  # never needed in a batch of one; saves a warning
    )
    return written


def _prefill(model: Any, prompt: Tensor) -> None:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # As generation does it: only the last position's logits are wanted.
    last_only = "logits_to_keep" in inspect.signature(base.forward).parameters
    options: dict[str, Any] = {"logits_to_keep": 1} if last_only else {}
    if model.config.is_encoder_decoder:  # the encoder reads the prompt, the decoder begins
        options["decoder_input_ids"] = torch.zeros_like(prompt[:, :1])
    model(input_ids=prompt, use_cache=True, **options)


def _seconds(model: Any, work: Callable[[], Any]) -> float:
    _wait_for(model.device)
    start = time.perf_counter()
    work()
    _wait_for(model.device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    """Wait until an accelerator has finished its queued work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
