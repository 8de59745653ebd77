"""Evaluate a model beside its teacher on held-out rows: quality, size, speed and memory.

Quality is computed from sums by row (`evaluation.row_sums`), gathered over all processes, so that
no figure depends on the batch size or on the number of processes. Speed and memory are measured on
the main process while the others wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.data import collator
from hf_distill.errors import InputError
from hf_distill.evaluation import performance
from hf_distill.evaluation.metrics import (
    BitsPerByte,
    CalibrationError,
    Perplexity,
    RowMetric,
    TeacherAgreement,
)
from hf_distill.evaluation.row_sums import row_sums, text_bytes
from hf_distill.losses.signals import Sampled, TopK
from hf_distill.losses.targets import Targets
from hf_distill.models import vocabulary
from hf_distill.models.engines import one_accelerator
from hf_distill.models.from_scratch import max_positions
from hf_distill.tasks import find_task
from hf_distill.teachers import AdapterTeacher, LiveTeacher, Teacher, as_teacher
from hf_distill.teachers.placement import placed_by_itself

Batch = Mapping[str, Any]
T = TypeVar("T")


@torch.no_grad()
def evaluate_student(
    student: PreTrainedModel,
    teacher: PreTrainedModel | Teacher | str | None,
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data_collator: Callable[[list[Any]], Batch] | None = None,
    batch_size: int = 8,
    shared_vocabulary: int | None = None,
    accelerator: Accelerator | None = None,
    speed: bool = True,
    description: str = "evaluating",
) -> dict[str, float]:
    """Measure a model beside its teacher: quality, size, speed and memory.

    student: a causal language model; for the teacher's own figures, the teacher
    teacher: None leaves out the figures that compare with it. Both models run in eval mode, in
        their own dtype (and the accelerator's mixed precision, if it has one). Their modes and
        flags are restored afterwards; they stay on the accelerator's device.
    dataset: rows with input_ids, labels, and perhaps attention_mask, position_ids
    data_collator: rows to a padded batch; default `hf_distill.data.collator(tokenizer)`
    batch_size: rows at a time on each process
    shared_vocabulary: how many ids, from 0 on, mean the same to both, for KL and agreement;
        default: what both heads and the tokenizer have, checked where the teacher's is known
    speed: measure also prefill, decoding and peak memory, about a second for a small model
    returns: `perplexity`, `ce` (nats a target), `bits_per_byte`, `kl_to_teacher` (nats a target),
        `top1_agreement`, `calibration_error`, `targets`, `parameters`, `size_mb`; with `speed` also
        `prefill_tokens_per_s`, `decode_tokens_per_s`, `peak_memory_mb`; the same on every process.
        docs/evaluation.md defines each.
    raises: InputError for rows without targets, ids that a model lacks, a loss that is not finite
    """
    collate = data_collator or collator(tokenizer)
    with one_accelerator(accelerator) as accelerator, _as_they_were(student, teacher):
        batches = _batches(dataset, collate, batch_size, accelerator)
        pair = _Pair(student, teacher, accelerator)
        if shared_vocabulary is None:
            shared_vocabulary = pair.shared_vocabulary(tokenizer)
        shown = tqdm(batches, description, disable=not accelerator.is_main_process, leave=False)
        figures = _quality(pair, shown, tokenizer, shared_vocabulary, accelerator)
        figures |= performance.size(pair.plain)
        if speed and not pair.together:  # what is in shards is asked by all processes at once
            figures |= _on_main(accelerator, lambda: performance.speed(pair.plain))
    return figures


class _Pair:
    """A student and its teacher, run on the same batches."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | Teacher | str | None,
        accelerator: Accelerator,
    ) -> None:
        self.plain = accelerator.unwrap_model(student)
        self.task = find_task(self.plain, "student")
        self.wrapped = student.eval()
        self.student = self.task.runner(self.plain, "model")
        self.student.autocast = accelerator.autocast
        found = None if teacher is student else as_teacher(teacher)
        if found is not None:
            found.prepare(accelerator, student_reads=self.student.embedding_rows)
        live = isinstance(found, LiveTeacher) and not isinstance(found, AdapterTeacher)
        own = live and getattr(found, "model", None) is student
        self.together = own and getattr(found, "together", False)
        self._itself = own or teacher is student
        self.teacher = None if self._itself else found
        if not own and not placed_by_itself(self.plain):
            student.to(accelerator.device)

    def shared_vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """The number of ids that mean the same to both; InputError if their tokens differ."""
        if self.teacher is None:
            return self.student.outcomes
        return vocabulary.shared_vocabulary(
            self.student.outcomes, self.teacher.rows, tokenizer, self.teacher.tokenizer
        )

    def logits(self, batch: Batch, targets: Targets) -> tuple[Tensor, Tensor | None]:
        """The logits of student and teacher at the targets, (targets, vocabulary) each.

        A model that is its own teacher is run once, so that it agrees with itself exactly.
        """
        inputs = self.task.model_inputs(batch)
        ours = self.student.signal(inputs, targets, self.wrapped).logits.to(targets.index.device)
        if self._itself:
            return ours, ours
        if self.teacher is None:
            return ours, None
        signal = self.teacher.signal(inputs, targets)
        if isinstance(signal, Sampled | TopK):
            raise InputError(
                f"the teacher {self.teacher.name!r} gives only some ids of its distributions, but "
                "these figures compare whole distributions: evaluate with a live teacher"
            )
        return ours, signal.logits.to(ours.device)


def _quality(
    pair: _Pair,
    batches: Iterable[Batch],
    tokenizer: PreTrainedTokenizerBase,
    shared_vocabulary: int,
    accelerator: Accelerator,
) -> dict[str, float]:
    metrics: list[RowMetric] = [Perplexity(), CalibrationError()]
    if pair.task.fused:  # labels are tokens, which spell a text
        metrics.insert(1, BitsPerByte())
    rows = targets = 0
    for batch in batches:
        if not pair.task.has_labels(batch):
            raise InputError(
                f"the evaluation batch has no labels, only {', '.join(batch)}: add a labels "
                "column, or pass a data_collator that makes one"
            )
        labels = pair.task.labels(batch)
        ours, theirs = pair.logits(batch, pair.task.targets(batch))
        if theirs is not None and not any(isinstance(m, TeacherAgreement) for m in metrics):
            metrics.append(TeacherAgreement())
        sums = row_sums(ours, theirs, labels, shared_vocabulary)
        if pair.task.fused:
            sums["bytes"] = text_bytes(labels, tokenizer)
        sums = {k: v.cpu() for k, v in accelerator.gather_for_metrics(sums).items()}
        _refuse_non_finite(sums, rows)
        for metric in metrics:
            metric.add_batch(**{name: sums[name].numpy() for name in metric.columns})
        rows += len(sums["targets"])
        targets += int(sums["targets"].sum())
    figures: dict[str, float] = {"targets": targets}
    for metric in metrics:
        figures |= metric.compute()
    return figures


def _batches(
    dataset: Any,
    data_collator: Callable[[list[Any]], Batch],
    batch_size: int,
    accelerator: Accelerator,
) -> DataLoader[Any]:
    if not isinstance(dataset, Sized):
        raise InputError(
            f"the evaluation rows are a {type(dataset).__name__}, which cannot be counted: give a "
            "datasets.Dataset, for a stream Dataset.from_list(list(stream.take(1000)))"
        )
    if len(dataset) == 0:
        raise InputError("there are no evaluation rows: give data.eval, or a larger eval_fraction")
    rows: Any = dataset
    loader: DataLoader[Any] = DataLoader(rows, batch_size, collate_fn=data_collator)
    return accelerator.prepare_data_loader(loader)


@contextmanager
def _as_they_were(*models: Any) -> Iterator[None]:
    """Whatever happens inside, modes and gradient flags are afterwards what they were."""
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


def _refuse_non_finite(sums: Mapping[str, Tensor], rows_before: int) -> None:
    for name, what in (("nll", "model's loss"), ("kl", "KL to the teacher")):
        if name in sums and not sums[name].isfinite().all():
            row = int((~sums[name].isfinite()).nonzero()[0])
            raise InputError(
                f"the {what} is {sums[name][row].item()} in evaluation row {rows_before + row}: "
                "the weights have diverged, or their dtype is too narrow (load the model in "
                "float32 or bfloat16)"
            )


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


@torch.no_grad()
def continuations(
    models: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int = 48,
) -> list[dict[str, str]]:
    """Greedy continuations of the same prompts by several models, side by side.

    models: by the name that their text gets; prompts: token ids
    max_new_tokens: fewer where a model has no position left for them
    returns: for each prompt, `prompt` and each model's continuation of it, as text
    raises: InputError for a prompt that leaves a model no position at all
    """
    table = []
    with _as_they_were(*models.values()):
        for prompt in prompts:
            ids = {"prompt": list(prompt)}
            for name, model in models.items():
                ids[name] = _continue(model.eval(), name, ids["prompt"], max_new_tokens)
            texts = (str(tokenizer.decode(i, skip_special_tokens=True)) for i in ids.values())
            table.append(dict(zip(ids, texts, strict=True)))
    return table


def _continue(model: Any, name: str, prompt: list[int], max_new_tokens: int) -> list[int]:
    limit = max_positions(model.config)
    if limit is not None and limit <= len(prompt):
        raise InputError(
            f"a prompt has {len(prompt)} tokens, but the {name} has only {limit} positions: "
            "cut the prompts shorter"
        )
    room = max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt))
    ids = torch.tensor([prompt], device=model.device)
    written = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        synced_gpus=False,  # what runs here is whole, or run by all processes alike
        num_beams=1,
        max_new_tokens=room,
        pad_token_id=0,  # never needed in a batch of one; saves a warning
    )
    return written[0, len(prompt) :].tolist()
