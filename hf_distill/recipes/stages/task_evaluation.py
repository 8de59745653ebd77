"""References, generation settings and examples for the evaluation of tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_distill.data.prompts import for_languages
from hf_distill.evaluation import Evaluation, examples
from hf_distill.recipes.stages.models import rows_of, text_of, tokenizer_of
from hf_distill.recipes.stages.stage import Run

WRITERS = "seq2seq-lm"


def references_of(run: Run) -> dict[str, Any]:
    """What is right in each set of rows, by split: target texts, or rows of text."""
    if run.recipe.task == "causal-lm":
        return {}
    texts = {split: text_of(run, split) for split in run.recipe.data.eval_splits}
    return {n: of["target"] if run.recipe.task == WRITERS else of for n, of in texts.items()}


def generation_of(run: Run) -> dict[str, Any] | None:
    """How an encoder-decoder writes; None for other tasks."""
    if run.recipe.task != WRITERS:
        return None
    data, beams = run.recipe.data, run.recipe.evaluate.num_beams
    _, forced = for_languages(tokenizer_of(run), data.source_lang, data.target_lang)
    settings = {"num_beams": beams, "do_sample": False, **forced}
    return {**settings, "max_new_tokens": data.max_target_length}


def examples_of(run: Run, measured: Mapping[str, Evaluation]) -> list[dict[str, str]]:
    """Some rows of the first set with each model's prediction, those the student gets wrong first.

    measured: by role, on that set
    """
    split = run.recipe.data.eval_splits[0]
    shown = {
        role: found
        for role, found in measured.items()
        if role != "initial" and found.predictions is not None
    }
    prompts = None
    if run.recipe.task != "masked-lm":  # which shows the masks
        prompts = [_prompt(row) for row in text_of(run, split)]
    number, tokenizer = run.recipe.evaluate.prompts, tokenizer_of(run)
    return examples(shown, rows_of(run, split), tokenizer, number=number, prompts=prompts)


def _prompt(row: Any) -> str:
    """What models read in a row of text."""
    if "context" in row:
        return f"{row['question']}\n\n{row['context']}"
    if "tokens" in row:
        return " ".join(row["tokens"])
    return "\n".join(row[name] for name in ("source", "text", "pair") if name in row)
