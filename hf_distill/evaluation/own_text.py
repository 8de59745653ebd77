"""Let a model continue held-out prompts, and measure the generated text.

The text is sampled from the model's own distribution. The mean divergence from the teacher on such
text is what on-policy distillation minimises, and an error at one token affects the next ones.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.data import collator
from hf_distill.data.text_figures import length_and_variety
from hf_distill.errors import InputError
from hf_distill.evaluation.continuations import split_row
from hf_distill.evaluation.evaluate import as_they_were, collect, prepared
from hf_distill.evaluation.generation_metrics import rouge_scorer
from hf_distill.evaluation.pair import Outputs, Pair
from hf_distill.evaluation.predictions import Predictions
from hf_distill.evaluation.row_sums import row_sums
from hf_distill.evaluation.task_measures import Evaluation, Measure
from hf_distill.losses.targets import IGNORE
from hf_distill.models.base import base_model
from hf_distill.models.engines import one_accelerator
from hf_distill.models.generation import PLAIN, Generator
from hf_distill.tasks import CausalLM
from hf_distill.teachers import Teacher


@torch.no_grad()
def evaluate_written(
    model: PreTrainedModel,
    teacher: PreTrainedModel | Teacher | str | None,
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_tokens: int = 32,
    max_new_tokens: int = 128,
    sampling_temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    accelerator: Accelerator | None = None,
) -> Evaluation:
    """Let a causal language model continue the prompts of held-out rows, and measure its texts.

    model: not sharded; pass the teacher for the teacher's own figures
    teacher: None leaves out the figures that compare with it
    dataset: rows with input_ids and labels. The prompt is the part before the first target, the
        reference the first run of targets; see `split_row`
    prompt_tokens: length of the prompt in rows of plain text
    sampling_temperature: 0 is greedy
    seed: a sampled text depends on the seed, the index of its row and the prompt. It does not
        depend on the batch size or the number of processes, up to rounding
    batch_size: rows at a time on each process
    returns: `written_rougeL`, the mean F-measure with the reference, 0 to 1, of rows that have one;
        `written_tokens`, `written_cut`, `written_repetition`, `written_distinct`, see
        `length_and_variety`; over all generated tokens `written_log_prob` and
        `written_teacher_log_prob`, the mean log-probability of the token under model and teacher,
        `written_reverse_kl`, KL(model || teacher), in nats per token, and `written_agreement`, the
        share of positions where both have the same most likely token. Distributions are at
        temperature 1 over the ids that both models share. `predictions` has text and reference of
        each row. All are the same on every process
    raises: InputError for a model that is not a causal language model, rows without input_ids, a
        prompt that leaves model or teacher no position, or distributions that are not finite
    """
    with one_accelerator(accelerator) as accelerator, as_they_were(model, teacher):
        pair = Pair(model, teacher, accelerator)
        _check(pair)
        rows = prepared(pair.task, dataset, tokenizer, own_form=True)
        split = [split_row(row, prompt_tokens, max_new_tokens) for row in rows]
        shared = min(pair.shared_outcomes(tokenizer), len(tokenizer))
        writer = _Writer(pair, tokenizer, shared, max_new_tokens, sampling_temperature, accelerator)
        # Prompts of similar length are continued together.
        order = sorted(range(len(split)), key=lambda row: (len(split[row][0]), row))
        references = [split[row][1] for row in order]
        measure = OwnText(tokenizer, references, writer.ends, shared, order)
        loader: DataLoader[Any] = DataLoader(order, batch_size)  # type: ignore[arg-type]
        batches = accelerator.prepare_data_loader(loader)
        shown = tqdm(batches, "writing", disable=not accelerator.is_main_process, leave=False)
        for numbers in shown:
            prompts = [split[row][0] for row in numbers.tolist()]
            seeds = [zlib.crc32(f"{seed} {row}".encode()) for row in numbers.tolist()]
            batch = collator(tokenizer)(writer.write(prompts, seeds))
            moved = {name: part.to(accelerator.device) for name, part in batch.items()}
            collect(measure, pair.outputs(moved), accelerator)
    return Evaluation(measure.figures(), [measure])


class OwnText(Measure):
    """The generated text after each prompt, with log-probabilities under model and teacher.

    references: ids to compare each text with, may be empty
    ends: ids that end a text; shared: see `row_sums`
    order: the number of each row in the data set, in the order in which rows are added
    """

    widths_differ: ClassVar[frozenset[str]] = frozenset({"written"})

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        references: Sequence[list[int]],
        ends: frozenset[int],
        shared: int,
        order: Sequence[int],
    ) -> None:
        super().__init__()
        self._tokenizer, self._references = tokenizer, references
        self._ends, self._shared, self._order = ends, shared, order

    def columns(self, outputs: Outputs) -> dict[str, Tensor]:
        """See `Measure.columns`: the ids, and sums over the tokens of each row."""
        labels, ours = outputs.labels, outputs.student[:, : self._shared]
        texts = [row[row != IGNORE] for row in labels]
        found = {"written": pad_sequence(texts, batch_first=True, padding_value=IGNORE)}
        found["log_prob"] = -row_sums(ours, None, labels, self._shared)["nll"]
        if outputs.teacher is not None:
            own = outputs.teacher is outputs.student  # then it agrees with itself exactly
            theirs = ours if own else outputs.teacher[:, : self._shared]
            # With their places exchanged: the teacher's log-probabilities, and the reverse KL.
            judged = row_sums(theirs, ours, labels, self._shared)
            found["teacher_log_prob"] = -judged["nll"]
            found |= {"reverse_kl": judged["kl"], "agreement": judged["agreed"]}
        return found

    def add(self, columns: Mapping[str, Tensor]) -> None:
        """See `Measure.add`."""
        for name, values in columns.items():
            if not values.isfinite().all():
                raise InputError(
                    f"the {name.replace('_', ' ')} of a generated text is not finite: the weights "
                    "of model or teacher have diverged, or their dtype is too narrow (load them in "
                    "float32 or bfloat16)"
                )
        super().add(columns)

    def figures(self) -> dict[str, float]:
        """See `Measure.figures` and `evaluate_written`."""
        texts = self._ids
        finished = [bool(ids) and ids[-1] in self._ends for ids in texts]
        tokens = sum(map(len, texts))
        scores = [score for score in self._scores if not math.isnan(score)]
        found = {"written_rougeL": math.fsum(scores) / len(scores)} if scores else {}
        found |= length_and_variety(texts, finished)
        names = ("log_prob", "teacher_log_prob", "reverse_kl", "agreement")
        sums = {name: math.fsum(self.rows[name]) for name in names if name in self.rows}
        return found | {f"written_{name}": value / tokens for name, value in sums.items()}

    def predictions(self) -> Predictions:
        """See `Measure.predictions`; the score is the ROUGE-L of the row, 0 to 1."""
        by_row = sorted(range(len(self._order)), key=lambda at: self._order[at])
        texts, references = self._spelt(self._ids), self._spelt(self._references)
        return Predictions(
            [texts[at] for at in by_row],
            [references[at] for at in by_row],
            [self._scores[at] for at in by_row],
        )

    @property
    def _ids(self) -> list[list[int]]:
        return [[token for token in row if token != IGNORE] for row in self.rows["written"]]

    @cached_property
    def _scores(self) -> list[float]:
        """The ROUGE-L of each row, NaN without a reference."""
        references = self._spelt(self._references)
        scorer = rouge_scorer(["rougeL"], [references])
        return [
            scorer.score(reference, text)["rougeL"].fmeasure if reference else math.nan
            for text, reference in zip(self._spelt(self._ids), references, strict=True)
        ]

    def _spelt(self, ids: Sequence[list[int]]) -> list[str]:
        return self._tokenizer.batch_decode(list(ids), skip_special_tokens=True)


class _Writer:
    """Continues prompts by ids that model and teacher share, within the positions of both."""

    def __init__(
        self,
        pair: Pair,
        tokenizer: PreTrainedTokenizerBase,
        shared: int,
        max_new_tokens: int,
        sampling_temperature: float,
        accelerator: Accelerator,
    ) -> None:
        self._model, self._most, self._autocast = pair.plain, max_new_tokens, accelerator.autocast
        pad = tokenizer.pad_token_id
        self._pad = (tokenizer.eos_token_id if pad is None else pad) or 0
        never = base_model(pair.plain).generation_config.suppress_tokens or []
        never = sorted({*never, *range(shared, pair.student.outcomes)})
        self._settings: dict[str, Any] = {**PLAIN, "suppress_tokens": never or None}
        if sampling_temperature > 0:
            drawn = {"do_sample": True, "temperature": sampling_temperature, "top_k": 0}
            self._settings |= drawn
        runners = {"model": pair.student, "teacher": getattr(pair.teacher, "runner", None)}
        limits = {role: getattr(one, "longest_text", None) for role, one in runners.items()}
        self._limits = {role: limit for role, limit in limits.items() if limit is not None}
        ends = self._generator(max_new_tokens).config.eos_token_id
        self.ends = frozenset(ends if isinstance(ends, list) else [ends])

    def write(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[dict[str, Any]]:
        """Rows with input_ids and labels, whose targets are the generated tokens."""
        rows: list[dict[str, Any]] = []
        at = 0
        for room, group in groupby(prompts, key=self._room):
            part = list(group)
            drawn = [[seed] for seed in seeds[at : at + len(part)]]
            for prompt, (ids, _) in zip(
                part, self._generator(room).texts(part, drawn), strict=True
            ):
                labels = [IGNORE] * len(prompt) + ids
                rows.append({"input_ids": prompt + ids, "labels": labels})
            at += len(part)
        return rows

    def _room(self, prompt: list[int]) -> int:
        for role, limit in self._limits.items():
            if len(prompt) >= limit:
                raise InputError(
                    f"a prompt has {len(prompt)} tokens, but the {role} has only {limit} "
                    "positions: cut the prompts shorter"
                )
        return min([self._most, *(limit - len(prompt) for limit in self._limits.values())])

    def _generator(self, room: int) -> Generator:
        return Generator(
            self._model,
            {**self._settings, "max_new_tokens": room},
            pad_token_id=self._pad,
            autocast=self._autocast,
        )


def _check(pair: Pair) -> None:
    """InputError for a model that cannot generate here."""
    if not isinstance(pair.task, CausalLM):
        raise InputError(
            f"the model is for {pair.task.name}, but only a causal language model continues "
            "prompts: for an encoder-decoder use evaluate_student(generate=...)"
        )
    if pair.together:
        raise InputError(
            "the model is sharded over the processes, which would have to generate together: "
            "evaluate it on one process"
        )
