"""Generate and score text: greedy search, beam search, or sampling with a seed for each text."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_distill.errors import InputError
from hf_distill.losses.targets import IGNORE, shifted_labels, sum_by_row, targets_of
from hf_distill.models.base import base_model
from hf_distill.models.mixture import Mixture
from hf_distill.models.positions import position_limit
from hf_distill.models.runner import ModelRunner

NEW_TOKENS = 256  # if neither the user nor the model's generation config sets a length
CHUNK_BYTES = 2**27  # memory for the logits of one chunk of scored tokens

# Settings for the model's unchanged distribution, in place of its generation config.
PLAIN: Mapping[str, Any] = {
    "num_beams": 1,
    "do_sample": False,
    "temperature": 1.0,
    "top_p": 1.0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": None,
    "forced_eos_token_id": None,
    "begin_suppress_tokens": None,
}

# Settings of `generate` that have no meaning here, with the reason.
_REFUSED = {
    "num_return_sequences": "give n",
    "stop_strings": "it needs the text of unfinished rows",
    "typical_p": "use temperature, top_k, top_p or min_p",
    "top_h": "use temperature, top_k, top_p or min_p",
    "epsilon_cutoff": "use temperature, top_k, top_p or min_p",
    "eta_cutoff": "use temperature, top_k, top_p or min_p",
}


@dataclass(frozen=True)
class Written:
    """A generated text.

    ids: the new tokens, with the end-of-text token if there is one
    log_prob: the sum of their log-probabilities, in nats, in the model's own distribution at
        temperature 1; a token that is forced (a language code) is not counted
    tokens: how many were counted; finished: whether the text ended before the length limit
    """

    ids: list[int]
    log_prob: float
    tokens: int
    finished: bool


class Generator:
    """Generates n texts for each prompt.

    model: causal or encoder-decoder, in eval mode
    settings: keywords of `generate`, which override the model's generation config
    n: texts per prompt: the best beams, or samples
    mixture: a second model, mixed into the distribution of every sampled token; not for an
        encoder-decoder
    raises: InputError for settings that are unknown or do not fit each other
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: Mapping[str, Any],
        *,
        pad_token_id: int,
        n: int = 1,
        autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
        mixture: Mixture | None = None,
    ) -> None:
        self.model: Any = model
        self.n = n
        self._mixture = mixture
        self.autocast = autocast
        self.encoder_decoder = bool(model.config.is_encoder_decoder)
        self.config = _config(model, settings, n)
        self.config.pad_token_id = pad_token_id
        self._restrictions = _restrictions(self.config) if self.draws else []
        # An encoder-decoder may add a bias after its head (BART), which whole logits contain.
        self._runner = ModelRunner(model, "teacher", fused=not self.encoder_decoder)
        self._runner.autocast = autocast

    @property
    def draws(self) -> bool:
        """Whether texts are sampled and so depend on the seeds."""
        return bool(self.config.do_sample)

    @property
    def new_tokens(self) -> int:
        """The most tokens that a text may have."""
        return self.config.max_new_tokens or self.config.max_length - 1

    @torch.no_grad()
    def write(
        self, prompts: Sequence[list[int]], seeds: Sequence[Sequence[int]]
    ) -> list[list[Written]]:
        """n texts for each prompt, with their scores; see `texts`."""
        texts, start = self._generate(prompts, seeds)
        everything = [prompt for prompt in prompts for _ in range(self.n)]
        scores = self._scores(everything, [ids for ids, _ in texts], start)
        written = [
            Written(ids, score, tokens, finished)
            for (ids, finished), (score, tokens) in zip(texts, scores, strict=True)
        ]
        return [written[at : at + self.n] for at in range(0, len(written), self.n)]

    @torch.no_grad()
    def texts(
        self, prompts: Sequence[list[int]], seeds: Sequence[Sequence[int]]
    ) -> list[tuple[list[int], bool]]:
        """n texts for each prompt: the new ids, and whether the text has ended.

        prompts: ids; seeds: for each prompt one number for each text, used if texts are sampled.
        A sampled text depends on its prompt and seed only, up to the rounding of batches of another
        shape.
        """
        return self._generate(prompts, seeds)[0]

    def _generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[Sequence[int]]
    ) -> tuple[list[tuple[list[int], bool]], Tensor | None]:
        """The texts, and the first decoder token of each where there is one."""
        repeats = self.n if self.draws else 1
        rows = [prompt for prompt in prompts for _ in range(repeats)]
        ids, mask = self._padded(rows)
        config, processors = self.config, LogitsProcessorList()
        if self.draws:
            config, processors = self._drawing([seed for of_row in seeds for seed in of_row], mask)
        with self.autocast(), _only(base_model(self.model), config):
            found = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=processors,
                synced_gpus=False,  # each process writes its own rows
            )
        first = 1 if self.encoder_decoder else ids.shape[1]
        start = found[:, :1] if self.encoder_decoder else None
        return [self._text(row) for row in found[:, first:].tolist()], start

    def _padded(self, rows: Sequence[list[int]], side: str = "") -> tuple[Tensor, Tensor]:
        """Ids and attention mask; a causal model continues rows that are padded on the left."""
        side = side or ("right" if self.encoder_decoder else "left")
        longest = max(map(len, rows))
        pad = self.config.pad_token_id
        ids, mask = [], []
        for row in rows:
            missing = longest - len(row)
            before, after = (missing, 0) if side == "left" else (0, missing)
            ids.append([pad] * before + row + [pad] * after)
            mask.append([0] * before + [1] * len(row) + [0] * after)
        device = self.model.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def _drawing(
        self, seeds: Sequence[int], mask: Tensor
    ) -> tuple[GenerationConfig, LogitsProcessorList]:
        """Settings for sampling by a logits processor; `generate` then decodes greedily.

        `generate` itself samples a whole batch from one random generator, so that a text would
        depend on the other texts.
        """
        config = copy.deepcopy(self.config)
        config.do_sample = False
        config.temperature, config.top_k, config.top_p, config.min_p = 1.0, 50, 1.0, None
        mixed = [] if self._mixture is None else [self._mixture.processor(mask)]
        return config, LogitsProcessorList([*self._restrictions, *mixed, _Draw(seeds)])

    def _text(self, row: list[int]) -> tuple[list[int], bool]:
        """The ids of one text without padding, and whether it has ended."""
        ends = self.config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        place = next((i for i, token in enumerate(row) if token in ends), None)
        if place is None:
            return row, False
        # At the length limit some models are made to end (forced_eos_token_id).
        forced = self.config.forced_eos_token_id is not None and place == len(row) - 1
        return row[: place + 1], not (forced and place + 1 >= self.new_tokens)

    def _scores(
        self, prompts: list[list[int]], texts: list[list[int]], start: Tensor | None
    ) -> list[tuple[float, int]]:
        """Sum of log-probabilities and number of scored tokens of each text."""
        longest = max(len(p) + len(t) for p, t in zip(prompts, texts, strict=True))
        size = 4 * self._runner.outcomes
        rows = max(1, CHUNK_BYTES // (size * longest)) if self.encoder_decoder else len(texts)
        found = []
        for at in range(0, len(texts), rows):
            part = slice(at, at + rows)
            found += self._scores_of(
                prompts[part], texts[part], None if start is None else start[part]
            )
        return found

    def _scores_of(
        self, prompts: list[list[int]], texts: list[list[int]], start: Tensor | None
    ) -> list[tuple[float, int]]:
        if start is None:
            rows = [p + t for p, t in zip(prompts, texts, strict=True)]
            ids, mask = self._padded(rows, "right")
            labels = ids.masked_fill(mask == 0, IGNORE)
            for row, prompt in enumerate(prompts):
                labels[row, : len(prompt)] = IGNORE
            batch = {"input_ids": ids, "attention_mask": mask}
            labels = shifted_labels(batch | {"labels": labels})
        else:
            ids, mask = self._padded(prompts)
            written, seen = self._padded(texts, "right")
            labels = written.masked_fill(seen == 0, IGNORE)
            if self.config.forced_bos_token_id is not None:
                labels[:, 0] = IGNORE
            decoder = torch.cat([start, written[:, :-1]], dim=1)
            batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder}
        targets = targets_of(labels, {})
        signal = self._runner.signal(batch, targets)
        chunk = max(1, CHUNK_BYTES // (4 * self._runner.outcomes))
        parts = []
        for at in range(0, len(targets), chunk):
            part = slice(at, at + chunk)
            log_probs = signal[part].logits.float().log_softmax(-1)
            parts.append(log_probs.gather(1, targets.labels[part, None])[:, 0])
        values = torch.cat(parts) if parts else torch.zeros(0, device=labels.device)
        if not values.isfinite().all():
            raise InputError(
                "the teacher's log-probabilities are not finite: load it in bfloat16 or float32 "
                "(teacher_model_kwargs)"
            )
        sums = sum_by_row(values, targets.row_of, len(texts)).tolist()
        counts = (labels != IGNORE).sum(-1).tolist()
        return list(zip(sums, counts, strict=True))


class _Draw(LogitsProcessor):
    """Samples a token for each row from the row's own generator and excludes all others."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # float64: in a float32 cumulative sum over 50k ids, some ids have an empty interval.
        sums = scores.float().softmax(-1).double().cumsum(-1)
        draws = [torch.rand(1, generator=one, dtype=torch.float64) for one in self.generators]
        at = torch.stack(draws).to(scores.device) * sums[:, -1:]
        drawn = torch.searchsorted(sums, at, right=True).clamp_(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


def _restrictions(config: GenerationConfig) -> list[LogitsProcessor]:
    """What changes the distribution before a token is drawn, in the order of `generate`."""
    found: list[LogitsProcessor] = []
    try:
        if config.temperature is not None:
            found.append(TemperatureLogitsWarper(float(config.temperature)))
        if config.top_k:
            found.append(TopKLogitsWarper(config.top_k))
        if config.top_p is not None and config.top_p != 1.0:  # which sorts the whole vocabulary
            found.append(TopPLogitsWarper(float(config.top_p)))
        if config.min_p is not None:
            found.append(MinPLogitsWarper(float(config.min_p)))
    except ValueError as error:
        raise InputError(_unfit(error)) from error
    return found


@contextmanager
def _only(model: Any, config: GenerationConfig) -> Iterator[None]:
    """A context in which `generate` takes no setting that is None from the model's own config."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def _unfit(error: ValueError) -> str:
    return f"the settings for generate do not fit: {' '.join(str(error).split())}"


def _config(model: PreTrainedModel, settings: Mapping[str, Any], n: int) -> GenerationConfig:
    """The model's generation config with the user's settings, checked."""
    known = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
    for name, value in settings.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{name!r} is no setting of generate{hint}")
        if name in _REFUSED and value is not None:
            raise InputError(f"{name!r} cannot be used here: {_REFUSED[name]}")
    config = copy.deepcopy(model.generation_config or GenerationConfig())
    try:
        config.update(**settings)
    except ValueError as error:
        raise InputError(_unfit(error)) from error
    if not model.config.is_encoder_decoder:
        # They count the padded prompt, so a text would depend on the other rows of the batch.
        for name in ("max_length", "min_length"):
            if settings.get(name):
                new = name.replace("length", "new_tokens")
                raise InputError(f"{name!r} counts the tokens of the prompt too: give {new!r}")
        config.max_length = None
        config.min_length = 0  # None would stand for the model's own
    if "max_new_tokens" in settings:
        config.max_length = None
    if config.max_new_tokens is None and config.max_length is None:
        places = position_limit(model) if model.config.is_encoder_decoder else None
        config.max_new_tokens = min(NEW_TOKENS, places or NEW_TOKENS)
    if n < 1:
        raise InputError(f"n is {n}, but must be at least 1")
    beams = config.num_beams or 1
    if config.do_sample and beams > 1:
        raise InputError(
            f"do_sample is True and num_beams {beams}, but texts are either drawn or searched: set "
            "only one of them"
        )
    if not config.do_sample and n > beams:
        raise InputError(
            f"n is {n}, but a search with {beams} beam{'s' if beams > 1 else ''} finds {beams} "
            "texts: set num_beams or do_sample"
        )
    config.num_return_sequences = 1 if config.do_sample else n
    return config
