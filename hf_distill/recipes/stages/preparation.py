"""Stage `prepare`: from raw text to rows of token ids and labels, and the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_distill.data import clean_rows, text_iterator, tokenize_rows
from hf_distill.models.from_scratch import train_tokenizer
from hf_distill.models.loading import load_tokenizer
from hf_distill.recipes import Recipe
from hf_distill.recipes.stages.inputs import check_sources, check_tokens, tokenizer_source
from hf_distill.recipes.stages.stage import Run


def prepare_data(run: Run, result: Path) -> None:
    """`data/`: train/ and eval/ (Arrow), tokenizer/, preparation.json."""
    recipe = run.recipe
    check_sources(recipe)
    rows, table = clean_rows(recipe.data, seed=recipe.seed, work_dir=result.parent / "arrow")
    tokenizer = _tokenizer(recipe, rows)
    check_tokens(recipe, tokenizer)
    tokens, table = tokenize_rows(rows, tokenizer, recipe.data, table)
    for split in ("train", "eval"):
        tokens[split].save_to_disk(result / split)
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
        text_iterator(rows), recipe.tokenizer.vocab_size, model_max_length=recipe.data.max_length
    )
