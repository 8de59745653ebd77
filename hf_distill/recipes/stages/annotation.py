"""Stage `annotate`: the teacher writes targets for the training rows, which the student learns."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk

from hf_distill.data import PreparationTable, Step, tokenize_rows
from hf_distill.data.prepare_tasks import tokenize_split
from hf_distill.data.prompts import Prompts
from hf_distill.data.tokenize import FINISHED, glue
from hf_distill.errors import InputError
from hf_distill.recipes import Recipe
from hf_distill.recipes.stages.given_models import check_student
from hf_distill.recipes.stages.models import (
    accelerator_of,
    rows_of,
    teacher_source,
    teacher_tokenizer_of,
    text_of,
    tokenizer_of,
)
from hf_distill.recipes.stages.stage import Run, remove
from hf_distill.recordings import annotate
from hf_distill.recordings.annotation import find_columns
from hf_distill.recordings.annotation_writer import prompt_of

WRITTEN = "written"
NEW_TOKENS = 256  # of a causal language model, where half of data.max_length is more
TARGETS = ("target", "completion", "messages")


def annotate_rows(run: Run, result: Path) -> None:
    """`annotation/`: written/, rows with the teacher's targets and scores; train/, as tokens."""
    run.from_main(lambda: check_student(run.recipe))  # it may have changed since `prepare`
    section, data = run.recipe.annotate, run.recipe.data
    assert section is not None
    causal = run.recipe.task == "causal-lm"
    tokens = section.max_new_tokens or default_new_tokens(run.recipe)
    generation: dict[str, Any] = {"num_beams": section.num_beams, "do_sample": section.do_sample}
    if section.do_sample:
        generation["temperature"] = section.temperature
    name, kwargs = teacher_source(run)
    accelerator = accelerator_of(run)
    limit = data.max_length - (tokens if causal else 0)
    texts, teacher_tokenizer = text_of(run, "train"), teacher_tokenizer_of(run)
    left_out = 0
    if causal:
        prompts = Prompts(teacher_tokenizer, False, None, data.prefix, data.separator)
        fitting = _fitting(texts, prompts, limit)
        left_out = len(texts) - len(fitting)
        texts = texts.select(fitting)
    # Beside the result, which is emptied when an interrupted stage goes on.
    folder = result.parent / WRITTEN
    written = annotate(
        texts,
        name,
        folder,
        tokenizer=teacher_tokenizer,
        generation=generation | {"max_new_tokens": tokens},
        n=section.n,
        prefix=data.prefix,
        separator=data.separator if causal else "",
        source_lang=data.source_lang,
        target_lang=data.target_lang,
        max_source_length=limit,
        batch_size=section.batch_size,
        shard_rows=section.shard_rows,
        seed=run.recipe.seed,
        accelerator=accelerator,
        **kwargs,
    )
    run.from_main(lambda: _tokenize(run, written, left_out, result))
    run.state.wait_for_everyone()  # the others may still have open what is moved away here
    run.from_main(lambda: folder.rename(result / WRITTEN))
    accelerator.free_memory()
    gc.collect()
    AcceleratorState._reset_state()


def default_new_tokens(recipe: Recipe) -> int:
    """The most tokens of a written target, where the recipe does not say."""
    if recipe.task == "seq2seq-lm":
        return recipe.data.max_target_length
    return min(NEW_TOKENS, recipe.data.max_length // 2)


def _fitting(texts: Dataset, prompts: Prompts, limit: int) -> list[int]:
    """The rows whose prompt the teacher can read whole; an answer to a part of it is none."""
    columns = find_columns(texts.column_names, None)
    lengths = (prompts.encode(prompt_of(row, columns))[1] for row in texts)
    found = [place for place, length in enumerate(lengths) if length <= limit]
    if not found:
        raise InputError(
            f"all of the {len(texts)} prompts are longer than {limit} tokens, which is "
            "data.max_length without the text to be written: raise it, or set "
            "annotate.max_new_tokens lower"
        )
    return found


def _tokenize(run: Run, written: Dataset, left_out: int, result: Path) -> None:
    """Save the rows that the student learns, tokenized as the original ones were.

    left_out: rows whose prompt was too long
    """
    section, config = run.recipe.annotate, run.recipe.data
    assert section is not None
    names = text_of(run, "train").column_names
    target = next(name for name in TARGETS if name in names)
    places = [i for i, value in enumerate(written[target]) if _text(value).strip()]
    blank = len(written) - len(places)
    if not places:
        raise InputError(
            f"the teacher wrote nothing for all of the {len(written)} texts: check its task, its "
            "training and data.prefix"
        )
    # A copy, so that the files of the next steps do not come to stand among the shards.
    copy = result.parent / "text"
    remove(copy)
    written.select(places).select_columns([*names, FINISHED]).save_to_disk(copy)
    rows, tokenizer = load_from_disk(str(copy)), tokenizer_of(run)
    removed = {"with a prompt too long": left_out, "of which nothing was written": blank}
    cut = len(rows) - sum(rows[FINISHED])
    changed = {"cut at the length limit, without an end": cut}
    step = Step("annotate", "train", len(rows), removed=removed, changed=changed)
    table = PreparationTable().add(step)
    if run.recipe.task == "seq2seq-lm":
        tokens, line = tokenize_split(rows, tokenizer, config, run.recipe.task)
        run.log(f"  {line}")
        count = sum(map(len, tokens["input_ids"]))
        table = table.add(Step("tokenize", "train", len(tokens), tokens=count))
    else:
        if isinstance(rows[0].get("prompt"), str):
            # The teacher has read the separator, also where it then began with white space.
            rows = rows.map(_ended, fn_kwargs={"separator": config.separator})
            config = config.model_copy(update={"separator": ""})
        found, table = tokenize_rows(DatasetDict(train=rows), tokenizer, config, table)
        tokens = found["train"]
    if section.keep_original:
        tokens = concatenate_datasets([rows_of(run, "train"), tokens])
    tokens.save_to_disk(result / "train")
    (result / "preparation.json").write_text(table.to_json())
    note = f", {blank:,} of them blank and left out" if blank else ""
    note += f", {cut:,} cut at the length limit" if cut else ""
    note += f"; {left_out:,} rows with a longer prompt left out" if left_out else ""
    beside = ", beside the original rows" if section.keep_original else ""
    run.log(f"  {len(written):,} texts{note}: the student learns {len(tokens):,} rows{beside}")


def _text(target: Any) -> str:
    """The text that was written, also where it is the last message of a conversation."""
    return target if isinstance(target, str) else target[-1]["content"]


def _ended(row: Mapping[str, str], separator: str) -> dict[str, str]:
    return {"prompt": row["prompt"] + glue(row["prompt"], "", separator)}
