"""Show held-out rows with the predictions of several models side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.errors import InputError
from hf_distill.evaluation.evaluate import evaluate_student, prepared
from hf_distill.evaluation.predictions import Predictions, chosen_rows
from hf_distill.evaluation.task_measures import Evaluation
from hf_distill.models.base import base_model
from hf_distill.tasks import Seq2SeqLM, find_task


def examples(
    models: Mapping[str, PreTrainedModel | Evaluation],
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    number: int = 8,
    prompts: Sequence[str] | None = None,
    references: Any = None,
    generate: Mapping[str, Any] | None = None,
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    batch_size: int = 8,
    accelerator: Accelerator | None = None,
) -> list[dict[str, str]]:
    """Choose some rows, and return each model's prediction for them as text.

    models: by name, of one task, in the order in which they are shown, the student last. Half of
        the rows are rows that the last model predicts wrong, if there are enough, the worst first.
        Instead of a model, you can pass what `evaluate_student` returned for it
    dataset, references, generate, data_collator, batch_size, accelerator: see `evaluate_student`;
        question answering needs `references`, and an encoder-decoder always generates
    number: of rows
    prompts: a text for each row (for question answering, for each question) to show as the prompt;
        by default the decoded ids
    returns: a dictionary for each row: `prompt`, `reference`, and the text of each model
    raises: InputError for causal language models (use `continuations`), and in the cases of
        `evaluate_student`
    """
    if not models:
        raise InputError("there are no models to show: give at least one, by name")
    rows: Any = dataset
    found: dict[str, Predictions] = {}
    for name, model in models.items():
        if not isinstance(model, Evaluation):
            task = find_task(base_model(model), "model")
            # Masks are drawn once, so that all models see those of the prompts.
            rows = prepared(task, rows, tokenizer, own_form=data_collator is None)
            model = evaluate_student(
                model,
                None,
                rows,
                tokenizer,
                references=references,
                generate={} if generate is None and isinstance(task, Seq2SeqLM) else generate,
                data_collator=data_collator,
                batch_size=batch_size,
                accelerator=accelerator,
                speed=False,
            )
        if model.predictions is None:
            raise InputError(
                f"there are no predictions of the model {name!r} to show: question answering needs "
                "references, an encoder-decoder has to generate, and causal language models are "
                "shown by hf_distill.evaluation.continuations"
            )
        found[name] = model.predictions
    *_, last = found.values()
    _check_alike(found, prompts)
    shown = []
    for row in chosen_rows(last.scores, number):
        prompt = prompts[row] if prompts is not None else _prompt(rows, references, row, tokenizer)
        texts = {name: of_model.texts[row] for name, of_model in found.items()}
        shown.append({"prompt": prompt, "reference": last.references[row], **texts})
    return shown


def _check_alike(found: Mapping[str, Predictions], prompts: Sequence[str] | None) -> None:
    """InputError for predictions of other rows, or another number of prompts."""
    (name, first), *others = found.items()
    for other, predictions in others:
        if predictions.references != first.references:
            raise InputError(
                f"the predictions of {name!r} and {other!r} are for other rows: measure all models "
                "on the same ones"
            )
    if prompts is not None and len(prompts) != len(first.texts):
        raise InputError(
            f"there are {len(prompts)} prompts and {len(first.texts)} predictions: give one "
            "prompt for each"
        )


def _prompt(rows: Any, references: Any, row: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The input of a model in a row as text: a line for each part between the special tokens."""
    if references is not None and "context" in references[row]:
        return f"{references[row]['question']}\n\n{references[row]['context']}"
    breaks = {
        tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id,
        tokenizer.eos_token_id, tokenizer.pad_token_id,
    }  # fmt: skip
    parts: list[list[int]] = [[]]
    for token in rows[row]["input_ids"]:
        if token in breaks:
            parts.append([])
        else:
            parts[-1].append(token)
    return "\n".join(str(tokenizer.decode(part)).strip() for part in parts if part)
