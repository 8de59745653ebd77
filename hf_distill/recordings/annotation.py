"""`annotate`: let the teacher write the targets of a data set (sequence-level distillation).

The rows are written in shards, like recordings. A kill loses at most one shard per process. A
second call resumes and ends with the same rows. Under `accelerate launch` the processes divide the
shards among them. Source: Kim and Rush, arXiv:1606.07947.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import xxhash
from accelerate import Accelerator
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.data.prompts import Prompts, for_languages, source_limit
from hf_distill.data.source_target import PAIRS, SourceTarget, find_source_target
from hf_distill.errors import InputError
from hf_distill.models.engines import made_whole, one_accelerator
from hf_distill.models.from_scratch import max_positions
from hf_distill.models.generation import Generator
from hf_distill.models.heads import which_files
from hf_distill.models.loading import load_model, load_tokenizer, local_tokenizer
from hf_distill.recordings.annotation_writer import AnnotationWriter
from hf_distill.recordings.filling import Bar, fill, in_cache, names_of, on_main_first
from hf_distill.recordings.shards import (
    arrow_table,
    claim,
    load_shards,
    shard_counts,
    write_table,
    write_whole,
)
from hf_distill.teachers.placement import place

MANIFEST = "annotation.json"
# Settings of `generate` that change what is sampled, with the values that change nothing.
NEUTRAL = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}
# Columns whose target may be missing, with the name that it gets.
ALONE = {
    "prompt": "completion",
    "text": "completion",
    "document": "summary",
    "article": "highlights",
    "dialogue": "summary",
    "source": "target",
}


def annotate(
    dataset: Any,
    teacher: PreTrainedModel | str | Path,
    output_dir: str | Path | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    generation: Mapping[str, Any] | None = None,
    n: int = 1,
    keep_targets: bool = False,
    columns: Mapping[str, str] | None = None,
    prefix: str = "",
    separator: str = "",
    source_lang: str | None = None,
    target_lang: str | None = None,
    max_source_length: int | None = None,
    too_long: Literal["truncate", "refuse"] = "truncate",
    batch_size: int = 8,
    shard_rows: int = 1000,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    **teacher_model_kwargs: Any,
) -> Dataset:
    """Return the rows with targets that the teacher has generated, n rows for each row.

    dataset: a `datasets.Dataset` or `IterableDataset` of rows with text
    teacher: a causal or encoder-decoder model, its id or path
    output_dir: where the shards are stored; by default a folder of the datasets cache, named after
        settings, teacher and rows. After an interruption, call it again with the same arguments
    tokenizer: the teacher's; by default the one in the teacher's folder or repository
    generation: settings of `generate`, such as {"num_beams": 4, "max_new_tokens": 64} or
        {"do_sample": True, "temperature": 0.7}, which override the teacher's generation config; at
        most 256 tokens if neither sets a length. Texts are sampled from the teacher's whole
        distribution at temperature 1, unless one of the two sets top_k, top_p, temperature, ...;
        what the teacher's generation config sets is printed
    n: texts for each row: the best beams, or samples
    keep_targets: keep the original targets and put the texts into the column "teacher_text";
        otherwise they replace the targets
    columns: {"source": ..., "target": ...}, where "translation.en" is a field of a column. By
        default `messages` (the last answer of the assistant is replaced), a pair of
        `data.source_target.PAIRS`, or a source without its target: `prompt` and `text` (into
        `completion`), `document`, `article`, `dialogue`, `source`. If only "source" is named, the
        target has the usual name for that source, else "target"
    prefix, separator: put before and after each source, the second for causal models only
    source_lang, target_lang: codes of models with languages (mBART, M2M100, NLLB)
    max_source_length: in tokens; by default the teacher's limit. A longer source is cut at the end
        and counted in a warning; with too_long="refuse" it is an error
    batch_size: rows at a time on each process, of similar length
    seed: of the sampling; each text has its own seed, so batches and processes do not matter
    teacher_model_kwargs: for `from_pretrained`
    returns: a memory-mapped `Dataset`, the same on every process, with three more columns:
        `teacher_log_prob`, the sum of the generated tokens' log-probabilities in nats, at
        temperature 1; `teacher_mean_log_prob`, the mean; `teacher_finished`, False for a text that
        was cut at the length limit. The n rows of a row follow each other.
    raises: InputError for settings, rows or a folder that cannot be used, and for a full disk
    """
    with one_accelerator(accelerator) as accelerator:
        model, tokenizer = _teacher(teacher, tokenizer, accelerator, teacher_model_kwargs)
        names = names_of(dataset)
        reads = find_columns(names, columns)
        generator = Generator(
            model,
            {**(generation or {}), **_forced(tokenizer, source_lang, target_lang)},
            pad_token_id=_padding(tokenizer),
            n=n,
            autocast=accelerator.autocast,
        )
        if generator.draws and (own := _own_settings(generator.config, generation or {})):
            accelerator.print(
                f"sampling: the teacher's generation config sets {own}; generation={{...}} "
                "overrides it"
            )
        prompts = _prompts(
            model, tokenizer, generator, prefix, separator, source_lang, max_source_length
        )
        writer = AnnotationWriter(
            generator, prompts, reads, keep_targets, too_long == "truncate", seed
        )
        writer.check_names(names)
        settings = {"source_lang": source_lang, "shard_rows": shard_rows}
        identity = writer.identity | settings
        folder = Path(output_dir) if output_dir else in_cache(dataset, identity, shard_rows)
        on_main_first(accelerator, lambda: claim(folder, identity, "an annotation"))
        if isinstance(dataset, Dataset):
            # Checked before hours of work, not after them.
            on_main_first(accelerator, lambda: writer.check(dataset))
        bar = Bar(dataset, accelerator, "annotate", "tokens", "")
        write = partial(_write, writer, shard_rows, batch_size, bar.report)
        shards = fill(
            folder, dataset, shard_rows, accelerator, bar, write=write, check=_check_same_rows
        )
        accelerator.wait_for_everyone()
        on_main_first(accelerator, lambda: _finish(folder, identity, shards))
    return load_shards(folder, MANIFEST, "annotation", "annotate")


def find_columns(names: list[str], columns: Mapping[str, str] | None) -> SourceTarget:
    """The columns that the teacher reads and writes; see `annotate`."""
    if columns is not None and set(columns) == {"source"}:
        source = columns["source"]
        return SourceTarget(source, {"messages": "messages", **ALONE}.get(source, "target"))
    if columns is None:
        if "messages" in names:
            return SourceTarget("messages", "messages")
        if not any({source, target} <= set(names) for source, target in PAIRS):
            for source, target in ALONE.items():
                if source in names:
                    return SourceTarget(source, target)
    return find_source_target(names, columns)


def _teacher(
    teacher: PreTrainedModel | str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    accelerator: Accelerator,
    kwargs: dict[str, Any],
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The teacher on its device, in eval mode, and its tokenizer.

    raises: InputError for keywords that nothing reads
    """
    settings = sorted(kwargs.keys() & vars(GenerationConfig()).keys())
    if settings or (kwargs and not isinstance(teacher, str | Path)):
        first = next(iter(settings or kwargs))
        where = "as generation={...}" if settings else "where the teacher is loaded"
        raise InputError(f"annotate takes no {first!r}: give it {where}")
    if isinstance(teacher, str | Path):
        with made_whole():
            model = load_model(teacher, "teacher", **kwargs)
        tokenizer = tokenizer or load_tokenizer(teacher, "teacher", **which_files(kwargs))
    else:
        model = teacher
        tokenizer = tokenizer or local_tokenizer(model.config.name_or_path)
    if not model.can_generate():
        raise InputError(
            f"the teacher is a {type(model).__name__}, which cannot generate text: give a causal "
            "or an encoder-decoder language model"
        )
    if tokenizer is None:
        raise InputError("the teacher's tokenizer is not known: give tokenizer")
    accelerator.print(f"teacher: {place(model, 'replicated', accelerator)}")
    return model.eval(), tokenizer


def _own_settings(config: GenerationConfig, given: Mapping[str, Any]) -> str:
    """The settings by which a teacher's own generation config changes what is sampled.

    given: the user's settings, which are left out
    """
    changed = {
        name: value
        for name, plain in NEUTRAL.items()
        if (value := getattr(config, name)) not in (None, plain) and name not in given
    }
    return ", ".join(f"{name}={value}" for name, value in changed.items())


def _forced(
    tokenizer: PreTrainedTokenizerBase, source: str | None, target: str | None
) -> dict[str, int]:
    return for_languages(tokenizer, source, target)[1]


def _padding(tokenizer: PreTrainedTokenizerBase) -> int:
    known = [i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None]
    if not known:
        raise InputError("the tokenizer has neither a padding nor an end-of-text token: set one")
    return known[0]


def _prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    generator: Generator,
    prefix: str,
    separator: str,
    source_lang: str | None,
    max_source_length: int | None,
) -> Prompts:
    marked, _ = for_languages(tokenizer, source_lang, None)
    kept = 0 if generator.encoder_decoder else generator.new_tokens
    limit = source_limit(marked, max_positions(model.config), kept)
    if max_source_length is not None:
        if max_source_length < 1 or (limit is not None and max_source_length > limit):
            most = f" to {limit}, the teacher's limit" if limit is not None else " or more"
            raise InputError(f"max_source_length is {max_source_length}, but must be 1{most}")
        limit = max_source_length
    return Prompts(marked, generator.encoder_decoder, limit, prefix, separator)


def _write(
    writer: AnnotationWriter,
    shard_rows: int,
    batch_size: int,
    report: Callable[[int, int], None],
    rows: Dataset,
    path: Path,
    index: int,
) -> None:
    plain = rows.with_format(None).to_list()
    made, counts = writer.rows(plain, index * shard_rows, batch_size, report)
    annotated = Dataset.from_list(made, features=writer.features(rows.features))
    notes = counts | {"input": _rows_hash(rows)}
    write_table(path, arrow_table(annotated), annotated.features, notes)


def _rows_hash(rows: Dataset) -> str:
    digest = xxhash.xxh3_64()
    for row in rows.with_format(None):
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode())
    return digest.hexdigest()


def _check_same_rows(path: Path, rows: Dataset) -> None:
    """InputError if a finished shard was made from other rows than the data set has now."""
    if json.loads(path.with_suffix(".json").read_text("utf-8"))["input"] != _rows_hash(rows):
        raise InputError(
            f"{path.name} in {str(path.parent)!r} was annotated from other rows: "
            "give another output_dir, or remove that folder"
        )


def _finish(folder: Path, identity: dict[str, Any], shards: int) -> None:
    """Write the manifest, which marks the annotation as complete; warn of cut or empty texts."""
    parts = shard_counts(folder, shards)
    names = ("rows", "cut", "tokens", "empty", "unfinished")
    counts = {name: sum(part[name] for part in parts) for name in names}
    versions = {name: version(name) for name in ("hf-distill", "torch", "transformers")}
    manifest = {**identity, "shards": shards, **counts, "versions": versions}
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=2))
    logger = logging.getLogger("hf_distill")
    texts = counts["rows"] * identity["n"]
    if counts["cut"]:
        logger.warning(
            "%d of %d sources were cut at the end, since they are longer than %d tokens.",
            counts["cut"],
            counts["rows"],
            identity["max_source_length"],
        )
    if counts["unfinished"]:
        logger.warning(
            "%d of %d texts were cut at the length limit: teacher_finished is False there.",
            counts["unfinished"],
            texts,
        )
    if counts["empty"]:
        logger.warning("%d of %d texts of the teacher are empty.", counts["empty"], texts)
