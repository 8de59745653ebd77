"""Stage `prepare`: from raw text to rows of token ids and labels, and the tokenizer."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_distill.data import (
    clean_rows,
    read_task_rows,
    text_iterator,
    tokenize_rows,
    tokenize_splits,
    with_spaces,
)
from hf_distill.errors import InputError
from hf_distill.models.from_scratch import train_tokenizer
from hf_distill.models.loading import load_tokenizer
from hf_distill.recipes import Recipe
from hf_distill.recipes.stages.given_models import check_student, given_labels
from hf_distill.recipes.stages.inputs import check_sources, check_tokens, tokenizer_source
from hf_distill.recipes.stages.models import LABELS
from hf_distill.recipes.stages.stage import Run

# The columns of tasks other than causal language modelling that a tokenizer is trained on.
TEXTS = ("text", "pair", "tokens", "question", "context", "source", "target")


def prepare_data(run: Run, result: Path) -> None:
    """`data/`: train/, eval/ or eval/NAME/ (Arrow), text/, tokenizer/, preparation.json."""
    recipe = run.recipe
    check_sources(recipe)
    check_student(recipe)
    arrow = result.parent / "arrow"
    if recipe.task == "causal-lm":
        rows, table = clean_rows(recipe.data, seed=recipe.seed, work_dir=arrow)
        if recipe.annotate is not None and rows["train"].column_names == ["text"]:
            raise InputError(
                "annotate lets the teacher answer prompts, but the rows are plain text: give rows "
                "with prompt and completion, or with messages"
            )
        tokenizer = _tokenizer(recipe, rows)
        check_tokens(recipe, tokenizer)
        tokens, table = tokenize_rows(rows, tokenizer, recipe.data, table)
        if recipe.annotate is not None:
            rows["train"].save_to_disk(result / "text" / "train")
    else:
        found = read_task_rows(
            recipe.data, recipe.task, seed=recipe.seed, work_dir=arrow, given=given_labels(recipe)
        )
        if found.note:
            run.log(f"  {found.note}")
        texts = found.rows.select_columns(
            [name for name in TEXTS if name in found.rows["train"].column_names]
        )
        tokenizer = _tokenizer(recipe, texts)
        if recipe.task == "token-classification" and tokenizer.is_fast:
            tokenizer = with_spaces(tokenizer)
        check_tokens(recipe, tokenizer)
        tokens, table, lines = tokenize_splits(
            found.rows,
            tokenizer,
            recipe.data,
            recipe.task,
            found.table,
            seed=recipe.seed,
            labels=found.labels,
        )
        for line in lines:
            run.log(f"  {line}")
        for split, of_split in found.rows.items():
            of_split.save_to_disk(result / "text" / split)
        if found.labels is not None:
            (result / LABELS).write_text(json.dumps(asdict(found.labels)), encoding="utf-8")
    for split, of_split in tokens.items():
        of_split.save_to_disk(result / split)
    tokenizer.save_pretrained(result / "tokenizer")
    (result / "preparation.json").write_text(table.to_json())
    run.show(table.render())


def _tokenizer(recipe: Recipe, rows: Any) -> PreTrainedTokenizerBase:
    source = tokenizer_source(recipe)
    if source is not None:
        name, files = source
        return load_tokenizer(name, "student", **files)
    assert recipe.tokenizer.vocab_size is not None
    return train_tokenizer(
        text_iterator(rows),
        recipe.tokenizer.vocab_size,
        model_max_length=recipe.data.max_length,
        task=recipe.task,
    )
