"""What a model is worth beside its teacher, on held-out rows.

perplexity       exp of the cross-entropy per target, over all ids of the model's head
bits_per_byte    the same in bits per byte of the text that the targets cover
kl_to_teacher    KL(teacher || model) per target, nats, at temperature 1, over shared ids
top1_agreement   share of targets where both have the same most likely token
calibration_error, parameters, size_mb, prefill and decode speed, peak memory
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.divergences import forward_kl
from hf_distill.errors import InputError
from hf_distill.measure import size
from hf_distill.measure import speed as measure_speed
from hf_distill.metrics.language import (
    CALIBRATION_BINS,
    CalibrationError,
    Likelihood,
    TeacherAgreement,
)
from hf_distill.objective import sum_by_row
from hf_distill.targets import IGNORE, position_ids, target_labels
from hf_distill.teachers import LiveTeacher, Teacher, as_teacher
from hf_distill.vocabulary import embedding_rows, head_rows

TARGETS_AT_ONCE = 1024
"""Float32 distributions held at a time: 1024 x 50257 of them take 200 MB."""

LESS_IS_BETTER = ("perplexity", "bits_per_byte", "kl_to_teacher", "calibration_error")
MORE_IS_BETTER = ("top1_agreement",)


@torch.no_grad()
def evaluate_student(
    student: PreTrainedModel,
    teacher: PreTrainedModel | Teacher | str | None,
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data_collator: Callable[[list[Any]], Mapping[str, Any]],
    batch_size: int = 8,
    shared_vocabulary: int | None = None,
    accelerator: Accelerator | None = None,
    speed: bool = True,
) -> dict[str, float]:
    """The figures above for one model; pass the teacher as the student for its own.

    dataset: rows of input_ids and labels; teacher: None leaves out what compares with it
    shared_vocabulary: how many ids mean the same to both; default: the smaller head
    raises: InputError if there is no row or no target, or a figure is not finite
    """
    if len(dataset) == 0:
        raise InputError("there are no evaluation rows: give data.eval, or a larger eval_fraction")
    accelerator = accelerator or Accelerator()
    signals = as_teacher(teacher)
    student.to(accelerator.device)
    if signals is not None:
        signals.prepare(accelerator, student_reads=embedding_rows(_base(student)))
    shared = min(head_rows(_base(student)), signals.rows if signals else 10**12, len(tokenizer))
    loader = accelerator.prepare(DataLoader(dataset, batch_size, collate_fn=data_collator))
    rows: list[Tensor] = []
    with _evaluating(student):
        for batch in tqdm(
            loader, desc="evaluating", disable=not accelerator.is_main_process, leave=False
        ):
            table = _row_sums(student, signals, batch, tokenizer, shared_vocabulary or shared)
            rows.append(accelerator.gather_for_metrics(table).cpu())
        figures = _figures(torch.cat(rows), with_teacher=signals is not None)
        figures |= size(student)
        if speed:
            figures |= measure_speed(student)
    return figures


def _row_sums(
    student: PreTrainedModel,
    teacher: Teacher | None,
    batch: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    shared: int,
) -> Tensor:
    """(rows, columns) float64: targets, bytes, nll, kl, agree, then the calibration bins."""
    labels = target_labels(batch)
    mask = labels != IGNORE
    row_of = mask.nonzero()[:, 0]
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "shift_labels")}
    accepted = inspect.signature(_base(student).forward).parameters
    if "attention_mask" in inputs and "position_ids" in accepted:
        inputs.setdefault("position_ids", position_ids(inputs["attention_mask"]))
    logits = student(**inputs, use_cache=False).logits[mask]
    itself = isinstance(teacher, LiveTeacher) and teacher.model is student
    signal = teacher.signal(inputs, mask).logits if teacher is not None and not itself else logits
    chunks = [
        _per_target(*pieces, shared)
        for pieces in zip(
            logits.split(TARGETS_AT_ONCE),
            signal.split(TARGETS_AT_ONCE),
            labels[mask].split(TARGETS_AT_ONCE),
            strict=True,
        )
    ]
    texts = tokenizer.batch_decode(
        [row[row != IGNORE] for row in labels],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    covered = torch.tensor([len(text.encode()) for text in texts], dtype=torch.float64)
    columns = [mask.sum(-1).double(), covered.to(labels.device)]
    columns += [
        sum_by_row(values, row_of, len(labels)) for values in torch.cat(chunks, dim=1).unbind()
    ]
    return torch.stack(columns, dim=-1)


def _per_target(student: Tensor, teacher: Tensor, labels: Tensor, shared: int) -> Tensor:
    """(3 + 2 * bins, targets) float32: nll, kl, agree, confidence and correctness by bin."""
    log_probabilities = F.log_softmax(student.float(), dim=-1)
    nll = F.nll_loss(log_probabilities, labels, reduction="none")
    ours = F.log_softmax(student[:, :shared].float(), dim=-1)
    theirs = F.log_softmax(teacher[:, :shared].float(), dim=-1)
    agree = (ours.argmax(-1) == theirs.argmax(-1)).float()
    confidence, best = log_probabilities.max(-1)
    confidence = confidence.exp()
    bins = (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    in_bin = F.one_hot(bins, CALIBRATION_BINS).T.float()
    correct = in_bin * (best == labels)
    head = torch.stack([nll, forward_kl(ours, theirs), agree])
    return torch.cat([head, in_bin * confidence, correct])


def _figures(table: Tensor, with_teacher: bool) -> dict[str, float]:
    if not table.isfinite().all():
        bad = int((~table.isfinite().all(-1)).nonzero()[0])
        raise InputError(
            f"evaluation row {bad} gives a figure that is not finite: the model has diverged, or "
            "its dtype is too narrow (load it in float32 or bfloat16)"
        )
    if table[:, 0].sum() == 0:
        raise InputError(
            "the evaluation rows have no target, since every label is -100: check the label masks"
        )
    columns = table.numpy().T
    targets, covered, nll, kl, agree = columns[:5]
    bins = columns[5:].reshape(2, CALIBRATION_BINS, -1).transpose(0, 2, 1)
    figures = Likelihood().compute(nll=nll, targets=targets, bytes=covered)
    figures |= CalibrationError().compute(confidence=bins[0], correct=bins[1], targets=targets)
    if with_teacher:
        figures |= TeacherAgreement().compute(kl=kl, agree=agree, targets=targets)
    return figures


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _base(model: Any) -> PreTrainedModel:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def compare(results: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Retention of the student, and how much of the gap to the teacher distillation closed.

    retention: student / teacher where more is better, teacher / student where less is
    gap_closed: (baseline - student) / (baseline - teacher), absent where the baseline is not
        worse than the teacher
    """
    teacher, student = results["teacher"], results["student"]
    baseline = results.get("baseline")
    retention, gap_closed = {}, {}
    for name in (*LESS_IS_BETTER, *MORE_IS_BETTER):
        if name not in teacher or name not in student:
            continue
        less = name in LESS_IS_BETTER
        above, below = (teacher, student) if less else (student, teacher)
        if below[name] and name != "kl_to_teacher":  # the teacher's own is 0
            retention[name] = above[name] / below[name]
        if baseline is not None:
            gap = baseline[name] - teacher[name]
            if (gap > 0) if less else (gap < 0):
                gap_closed[name] = (baseline[name] - student[name]) / gap
    return {"retention": retention, "gap_closed": gap_closed}


@torch.no_grad()
def continuations(
    models: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int = 40,
) -> list[dict[str, str]]:
    """Greedy continuations of the same prompts by each model, side by side.

    prompts: token ids; returns: {"prompt": text, <role>: text, ...} each
    """
    found = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        row = {"prompt": str(tokenizer.decode(list(prompt), skip_special_tokens=True))}
        for role, model in models.items():
            with _evaluating(model):
                made = model.generate(
                    input_ids=ids.to(model.device),
                    attention_mask=torch.ones_like(ids).to(model.device),
                    do_sample=False,
                    num_beams=1,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=tokenizer.pad_token_id,
                )
            row[role] = str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
        found.append(row)
    return found
