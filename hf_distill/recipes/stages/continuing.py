"""Texts of a run's causal language models: a few to show, and many to measure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from datasets import Dataset

from hf_distill.evaluation import continuations, evaluate_written
from hf_distill.evaluation.continuations import split_row
from hf_distill.recipes.stages.models import tokenizer_of
from hf_distill.recipes.stages.stage import Run
from hf_distill.teachers import Teacher


class Continuations:
    """Greedy continuations of a few rows of each set by one model after the other.

    table: a dictionary for each prompt, see `continuations`; with `set` where sets have names
    """

    def __init__(self, run: Run, sets: Mapping[str, Dataset]) -> None:
        self._run, self._prompts = run, []
        self.table: list[dict[str, str]] = []
        for split, rows in sets.items():
            of_set = {} if split == "eval" else {"set": split.removeprefix("eval/")}
            for row in _spread(rows, run.recipe.evaluate.prompts):
                self._prompts.append(split_row(row, _prompt_tokens(run))[0])
                self.table.append(dict(of_set))

    def add(self, role: str, model: Any) -> None:
        """Let a model continue the prompts."""
        most, tokenizer = self._run.recipe.evaluate.max_new_tokens, tokenizer_of(self._run)
        texts = continuations({role: model}, self._prompts, tokenizer, max_new_tokens=most)
        self.table = [{**before, **text} for before, text in zip(self.table, texts, strict=True)]


def written_by(
    run: Run, model: Any, teacher: Teacher, rows: Dataset, accelerator: Accelerator
) -> dict[str, float]:
    """The figures of a model's texts for the prompts of `evaluate.written` rows of a set."""
    section = run.recipe.evaluate
    return evaluate_written(
        model,
        teacher,
        _spread(rows, section.written),
        tokenizer_of(run),
        prompt_tokens=_prompt_tokens(run),
        max_new_tokens=section.max_new_tokens,
        seed=run.recipe.seed,
        batch_size=section.batch_size,
        accelerator=accelerator,
    )


def _prompt_tokens(run: Run) -> int:
    """Of a row without a prompt of its own; leaves positions for the continuation."""
    return min(run.recipe.evaluate.prompt_tokens, run.recipe.data.max_length // 2)


def _spread(rows: Dataset, number: int) -> Dataset:
    """A few rows, evenly over the set."""
    number = min(number, len(rows))
    return rows.select([i * len(rows) // number for i in range(number)])
