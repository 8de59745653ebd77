"""Evaluate a model beside its teacher on held-out rows: quality, size, speed and memory.

Quality is computed from columns by row (`evaluation.task_measures`), gathered over all processes,
so that no figure depends on the batch size or on the number of processes. Speed and memory are
measured on the main process while the others wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.data import mask_rows, task_collator
from hf_distill.errors import InputError
from hf_distill.evaluation import performance
from hf_distill.evaluation.pair import Outputs, Pair
from hf_distill.evaluation.task_measures import Evaluation, Measure, task_measures
from hf_distill.evaluation.writing import Texts
from hf_distill.losses.targets import IGNORE
from hf_distill.models.engines import one_accelerator
from hf_distill.tasks import CausalLM, MaskedLM, Seq2SeqLM, Task
from hf_distill.teachers import Teacher, as_teacher

Batch = Mapping[str, Any]
T = TypeVar("T")


@torch.no_grad()
def evaluate_student(
    student: PreTrainedModel,
    teacher: PreTrainedModel | Teacher | str | None,
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    references: Any = None,
    generate: Mapping[str, Any] | None = None,
    data_collator: Callable[[list[Any]], Batch] | None = None,
    batch_size: int = 8,
    shared_vocabulary: int | None = None,
    accelerator: Accelerator | None = None,
    speed: bool = True,
    description: str = "evaluating",
) -> Evaluation:
    """Measure a model beside its teacher: quality, size, speed and memory.

    student: a model of any task; pass the teacher for the teacher's own figures
    teacher: None leaves out the figures that compare with it. Both models run in eval mode, in
        their own dtype (and the accelerator's mixed precision, if it has one). Their modes and
        flags are restored afterwards; they stay on the accelerator's device.
    dataset: rows with input_ids and the labels of the task, and perhaps attention_mask,
        position_ids. Rows for masked language modelling without labels are masked once
    references: for question answering, the questions that the rows are windows of, which adds
        `exact_match` and `f1`; with `generate`, the target texts, by default what the labels spell
    generate: for an encoder-decoder: keywords of its `generate`, {} for its own settings; adds
        `rouge1`, `rouge2`, `rougeL`, `rougeLsum`, `bleu`, `chrf` of the generated texts
    data_collator: rows to a padded batch; default `hf_distill.data.collator(tokenizer)`, for other
        tasks than causal language modelling `TaskCollator`
    batch_size: rows at a time on each process
    shared_vocabulary: number of ids, from 0 on, that are the same tokens in both models, for KL and
        agreement; by default those of both heads and the tokenizer; the tokens are compared if the
        teacher's tokenizer is known
    accelerator: by default one with the mixed precision that an earlier Trainer in this process has
        set, otherwise without mixed precision
    speed: also measure speed and peak memory; takes about a second for a small model
    returns: `targets`; `ce` and `kl_to_teacher` (nats a target), `top1_agreement` and
        `calibration_error`; over a vocabulary also `perplexity`, and `bits_per_byte` where targets
        spell text; the metrics of the task; `parameters`, `size_mb`; with `speed` also
        `peak_memory_mb` and `prefill_tokens_per_s`, `decode_tokens_per_s`, or `examples_per_s` of a
        model that does not generate text; the same on every process. docs/evaluation.md defines
        each. `Evaluation.predictions` has the predictions for each row
    raises: InputError for rows without targets, ids or classes that a model lacks, or a loss that
        is not finite
    """
    with one_accelerator(accelerator) as accelerator, as_they_were(student, teacher):
        pair = Pair(student, teacher, accelerator)
        if shared_vocabulary is None:
            shared_vocabulary = pair.shared_outcomes(tokenizer)
        rows = prepared(pair.task, dataset, tokenizer, own_form=data_collator is None)
        measures = task_measures(pair, tokenizer, shared_vocabulary, rows, references)
        if generate is not None:
            measures.append(_texts(pair, tokenizer, generate, references, accelerator))
        collate = data_collator or task_collator(pair.task.key, tokenizer)
        measured = {"": (pair, measures)}
        found = _measure(measured, rows, collate, accelerator, batch_size, description)[""]
        found.update(costs_of({"": pair}, accelerator, speed=speed)[""])
    return found


@torch.no_grad()
def evaluate_models(
    models: Mapping[str, PreTrainedModel],
    teacher: PreTrainedModel | Teacher,
    datasets: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    references: Mapping[str, Any] | None = None,
    generate: Mapping[str, Any] | None = None,
    data_collator: Callable[[list[Any]], Batch] | None = None,
    batch_size: int = 8,
    accelerator: Accelerator | None = None,
    speed: bool = True,
) -> tuple[dict[str, dict[str, Evaluation]], dict[str, dict[str, float]]]:
    """Measure several models of one task beside one teacher, which runs once per batch for all.

    models: by name, may include the teacher's own model; all are in memory together
    datasets: sets of rows by name; references: by the same names
    generate: not for a sharded model; the other arguments: see `evaluate_student`
    returns: the quality of each model by set and name; and its size, with `speed` its speed and
        peak memory, by name. The models are timed in turn, see `in_turn`
    raises: InputError, as `evaluate_student`
    """
    with one_accelerator(accelerator) as accelerator, as_they_were(*models.values(), teacher):
        found = as_teacher(teacher)
        pairs = {name: Pair(model, found, accelerator) for name, model in models.items()}
        reads = max(pair.student.embedding_rows for pair in pairs.values())
        if found is not None:
            found.prepare(accelerator, student_reads=reads)
        shared = {name: pair.shared_outcomes(tokenizer) for name, pair in pairs.items()}
        (task, *_) = (pair.task for pair in pairs.values())
        collate, own_form = data_collator or task_collator(task.key, tokenizer), not data_collator
        quality = {}
        for of_set, dataset in datasets.items():
            rows = prepared(task, dataset, tokenizer, own_form=own_form)
            measured, true = {}, (references or {}).get(of_set)
            for name, pair in pairs.items():
                measures = task_measures(pair, tokenizer, shared[name], rows, true)
                if generate is not None and not pair.together:
                    measures.append(_texts(pair, tokenizer, generate, true, accelerator))
                measured[name] = pair, measures
            quality[of_set] = _measure(
                measured, rows, collate, accelerator, batch_size, f"evaluating {of_set}"
            )
        return quality, costs_of(pairs, accelerator, speed=speed)


def costs_of(
    pairs: Mapping[str, Pair], accelerator: Accelerator, *, speed: bool
) -> dict[str, dict[str, float]]:
    """Size of each model; its speed and peak memory, measured on the main process."""
    sizes = {name: performance.size(pair.plain) for name, pair in pairs.items()}
    # All processes run a sharded model together; it is not timed.
    timed = {name: pair for name, pair in pairs.items() if speed and not pair.together}
    if not timed:
        return sizes
    writes = all(isinstance(pair.task, CausalLM | Seq2SeqLM) for pair in timed.values())
    models = {name: pair.plain for name, pair in timed.items()}
    costs = _on_main(accelerator, lambda: performance.costs(models, writes=writes))
    return {name: of_model | costs.get(name, {}) for name, of_model in sizes.items()}


def _measure(
    measured: Mapping[str, tuple[Pair, Sequence[Measure]]],
    dataset: Any,
    data_collator: Callable[[list[Any]], Batch],
    accelerator: Accelerator,
    batch_size: int,
    description: str,
) -> dict[str, Evaluation]:
    """Run some models and their common teacher on all rows, and return the figures of each."""
    batches = _batches(dataset, data_collator, batch_size, accelerator)
    shown = tqdm(batches, description, disable=not accelerator.is_main_process, leave=False)
    for batch in shown:
        theirs: Tensor | None = None
        for pair, measures in measured.values():
            outputs = pair.outputs(batch, theirs)
            theirs = outputs.teacher
            for one in measures:
                collect(one, outputs, accelerator)
    return {
        name: Evaluation({k: v for one in of for k, v in one.figures().items()}, of)
        for name, (_, of) in measured.items()
    }


def collect(measure: Measure, outputs: Outputs, accelerator: Accelerator) -> None:
    """Gather a measure's columns of each batch, without the rows that fill the last batch."""
    columns = measure.columns(outputs)
    for name in measure.widths_differ & columns.keys():
        columns[name] = accelerator.pad_across_processes(columns[name], dim=1, pad_index=IGNORE)
    gathered = accelerator.gather_for_metrics(columns)
    measure.add({name: values.cpu() for name, values in gathered.items()})


def _texts(
    pair: Pair,
    tokenizer: PreTrainedTokenizerBase,
    settings: Mapping[str, Any],
    references: Any,
    accelerator: Accelerator,
) -> Texts:
    if not isinstance(pair.task, Seq2SeqLM):
        raise InputError(
            f"generate is given, but the model is for {pair.task.name}: leave it out, since only "
            "encoder-decoders generate targets"
        )
    if pair.together:
        raise InputError(
            "generate is given, but the model is sharded over the processes, which would have to "
            "generate together: evaluate it on one process"
        )
    return Texts(pair.plain, tokenizer, settings, references, accelerator.autocast)


def prepared(
    task: Task, dataset: Any, tokenizer: PreTrainedTokenizerBase, *, own_form: bool
) -> Any:
    """The rows; for masked language modelling with masks, so that all models get the same ones.

    own_form: whether the rows go to this library's collator: they must have input_ids, and rows
        without labels are masked
    raises: InputError for no rows, raw rows, or a stream
    """
    if not isinstance(dataset, Sized):
        raise InputError(
            f"the evaluation rows are a {type(dataset).__name__}, which cannot be counted: give a "
            "datasets.Dataset, for a stream Dataset.from_list(list(stream.take(1000)))"
        )
    if len(dataset) == 0:
        raise InputError("there are no evaluation rows: give data.eval, or a larger eval_fraction")
    rows: Any = dataset
    first = rows[0] if own_form else {}
    if isinstance(first, Mapping) and own_form and "input_ids" not in first:
        raise InputError(
            f"the evaluation rows have the columns {', '.join(first)}, but no input_ids: tokenize "
            "them first (`hf_distill.data`), or pass the eval_dataset of a trainer, which is "
            "tokenized"
        )
    if not own_form or not isinstance(task, MaskedLM) or "labels" in first:
        return rows
    rows = rows if isinstance(rows, Dataset) else Dataset.from_list(list(rows))
    return mask_rows(rows, tokenizer)


def _batches(
    rows: Any,
    data_collator: Callable[[list[Any]], Batch],
    batch_size: int,
    accelerator: Accelerator,
) -> DataLoader[Any]:
    loader: DataLoader[Any] = DataLoader(rows, batch_size, collate_fn=data_collator)
    return accelerator.prepare_data_loader(loader)


@contextmanager
def as_they_were(*models: Any) -> Iterator[None]:
    """A context after which modes and gradient flags are restored, also on an error."""
    models = tuple(model for model in models if isinstance(model, nn.Module))
    modes = [(module, module.training) for model in models for module in model.modules()]
    flags = [(p, p.requires_grad) for model in models for p in model.parameters()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Run work on the main process; its result or error reaches every process."""
    outcome: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            outcome = [work()]
        except Exception as error:
            outcome = [error]
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]
