"""Run a teacher over rows and encode its outputs, one value of bytes for each row."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_distill.data import Collator, TaskCollator, task_collator
from hf_distill.errors import InputError
from hf_distill.losses.signals import Hidden, Logits, whole
from hf_distill.models.vocabulary import shared_vocabulary
from hf_distill.recordings import codec
from hf_distill.recordings.codec import KINDS, TopK
from hf_distill.recordings.collator import header_of, starts_of
from hf_distill.recordings.extract import sampled, top_k_
from hf_distill.recordings.row_format import Header, model_hash, row_hash, tokenizer_hash, write
from hf_distill.tasks import CausalLM, MaskedLM, Task, find_task
from hf_distill.teachers import Teacher, as_teacher

CHUNK_BYTES = 2**27  # memory for the logits of one chunk of targets
# What tokenizes the raw rows of each task, in `hf_distill.data`.
TOKENIZERS = {
    "causal-lm": "tokenize_raw_rows",
    "seq2seq-lm": "tokenize_source_target",
    "masked-lm": "tokenize_texts, then mask_rows",
    "sequence-classification": "tokenize_labelled",
    "token-classification": "tokenize_tagged",
}


@dataclass(frozen=True)
class RecordingSettings:
    """The settings of a recording.

    kind: "top_k", the k likeliest ids with the exact mass of all others; "sampled", `draws` draws
        from the distribution, for forward_kl; "full", every log-probability
    temperature: that of the training to come ("full" serves any)
    seed: of the draws
    """

    kind: str = "top_k"
    k: int = 64
    draws: int = 50
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"kind is {self.kind!r}, but must be one of {', '.join(KINDS)}")
        for name in ("k", "draws"):
            if not 1 <= getattr(self, name) < 2**16:
                raise InputError(f"{name} is {getattr(self, name)}, but must be 1 to 65535")
        if not self.temperature > 0:
            raise InputError(f"temperature is {self.temperature}, but must be above 0")


class RecordingWriter:
    """Runs one teacher over rows and encodes its outputs."""

    def __init__(
        self,
        settings: RecordingSettings,
        teacher: PreTrainedModel | Teacher | str,
        tokenizer: PreTrainedTokenizerBase | None,
        data_collator: Callable[[list[Any]], Mapping[str, Any]] | None,
        accelerator: Accelerator,
        placement: str,
        model_kwargs: dict[str, Any],
    ) -> None:
        found = as_teacher(teacher, placement=placement, **model_kwargs)
        if found is None:
            raise InputError("there is no teacher to record: give a model, its id or its path")
        self.settings, self.teacher, self.device = settings, found, accelerator.device
        model = getattr(found, "model", None)
        self.task = getattr(found, "task", None) or (
            CausalLM() if model is None else find_task(model, "teacher")
        )
        if (reason := self.task.not_recorded) is not None:
            raise InputError(
                f"a teacher of {self.task.name} cannot be recorded, since {reason}: train with it "
                "live"
            )
        self.rounding: float | None = None  # of the first batch of the last call of `values`
        tokenizer = tokenizer or found.tokenizer
        self.collate = data_collator or _collator(self.task, tokenizer)
        vocabulary = found.rows
        if self.task.fused:
            vocabulary = shared_vocabulary(found.rows, found.rows, tokenizer, found.tokenizer)
        reads = 2**31 if tokenizer is None else len(tokenizer)
        found.prepare(accelerator, student_reads=reads)
        sizes = {"top_k": min(settings.k, vocabulary), "sampled": settings.draws, "full": 0}
        self.header = Header(
            kind=settings.kind,
            k=sizes[settings.kind],
            temperature=1.0 if settings.kind == "full" else settings.temperature,
            vocabulary=vocabulary,
            targets=0,
            row=0,
            teacher=_fingerprint(found),
            tokenizer=tokenizer_hash(tokenizer),
        )

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides a recording except its rows, as JSON."""
        identity = asdict(self.header)
        del identity["targets"], identity["row"]
        identity["teacher"] = f"{identity['teacher']:016x}"
        identity["tokenizer"] = f"{identity['tokenizer']:016x}"
        name = self.teacher.name
        if Path(name).exists():
            name = Path(name).name  # a path of this machine means nothing elsewhere
        identity |= {"codec": codec.VERSION, "teacher_name": name}
        return identity | ({"seed": self.settings.seed} if self.header.kind == "sampled" else {})

    def check_columns(self, names: Sequence[str]) -> None:
        """InputError for the columns of rows that cannot be recorded."""
        task = self.task
        if names and "input_ids" not in names:
            raise InputError(
                f"record takes tokenized rows, but these have the columns {', '.join(names)} and "
                f"no input_ids: tokenize them with hf_distill.data.{TOKENIZERS[task.key]}"
            )
        makes_no_labels = isinstance(self.collate, TaskCollator | DataCollatorForLanguageModeling)
        if not names or not makes_no_labels or {"label", *task.label_names} & {*names}:
            return
        if task.key == MaskedLM.key:
            raise InputError(
                f"the rows for {task.name} have no labels, so that each epoch masks other tokens "
                "than were recorded: mask them first with hf_distill.data.mask_rows, which gives "
                "input_ids and labels"
            )
        raise InputError(
            f"the rows for {task.name} have the columns {', '.join(names)}, but no labels: give "
            f"them as hf_distill.data.{TOKENIZERS[task.key]} does"
        )

    @torch.no_grad()
    def values(
        self,
        rows: Sequence[Mapping[str, Any]],
        batch_size: int,
        *,
        seed: int,
        report: Callable[[int, int, int], None] = lambda rows, targets, size: None,
        batches: int = 0,
    ) -> list[bytes]:
        """The recording of each row, in the order of the rows.

        seed: of the draws; report: called after each batch with its rows, targets and bytes
        batches: run the teacher at least this often, as often as other processes do
        """
        generator = torch.Generator().manual_seed(seed)
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i]["input_ids"]), i))
        values: list[bytes] = [b""] * len(rows)
        self.rounding = None
        for at in range(0, len(order), batch_size):
            chosen = order[at : at + batch_size]
            found = self._batch([rows[i] for i in chosen], generator)
            for i, value in zip(chosen, found, strict=True):
                values[i] = value
            targets = sum(header_of(value, "a row").targets for value in found)
            report(len(found), targets, sum(map(len, found)))
        for _ in range(math.ceil(len(order) / batch_size), batches):
            self._batch([rows[order[0]]], generator)
        return values

    def _batch(self, rows: list[Mapping[str, Any]], generator: torch.Generator) -> list[bytes]:
        batch = self.collate(rows)
        targets = self.task.targets(batch)
        on_device = {k: v.to(self.device) for k, v in batch.items()}
        signal = self.teacher.signal(
            self.task.model_inputs(on_device), self.task.targets(on_device)
        )
        wanted = targets.labels.to(self.device)
        if not isinstance(signal, Hidden | Logits):
            raise InputError("a recorded teacher cannot be recorded again: give the live one")
        chunk = max(1, CHUNK_BYTES // (4 * self.teacher.rows))
        parts = []
        with whole(signal) as at_hand:
            assert isinstance(at_hand, Hidden | Logits)
            for at in range(0, len(wanted), chunk):
                part = slice(at, at + chunk)
                logits = at_hand[part].logits[:, : self.header.vocabulary]
                logits = logits.to(self.device, torch.float32)
                parts.append(self._stored(logits, wanted[part], generator))
        stored = _joined(parts)
        if self.rounding is None and isinstance(stored, TopK):
            self.rounding = rounding(stored, self.header.vocabulary)
        values, at = [], 0
        starts, mask = starts_of(self.task, batch, len(rows)), targets.mask
        for number, row in enumerate(rows):
            places = mask[number].nonzero()[:, 0].numpy() - starts[number]
            mine = slice(at, at + len(places))
            at += len(places)
            labels = targets.labels[mine]
            header = replace(
                self.header,
                targets=len(places),
                row=row_hash(row["input_ids"], places, labels, row.get("position_ids")),
            )
            values.append(write(header, _encoded(stored, mine)))
        return values

    def _stored(self, logits: Tensor, labels: Tensor, generator: torch.Generator) -> Any:
        """What is stored of some targets; overwrites their logits."""
        softened = logits if self.header.temperature == 1.0 else logits / self.header.temperature
        stored: Any
        if self.header.kind == "full":
            stored = finite = logits.log_softmax(-1).cpu().numpy()
        elif self.header.kind == "sampled":
            stored = sampled(softened, self.header.k, generator)
            finite = stored.entropy
        else:
            stored = top_k_(softened, labels, self.header.k)
            finite = stored.log_probs
        if np.isnan(finite).any():
            raise InputError(_NOT_FINITE)
        return stored


_NOT_FINITE = (
    "the teacher's logits are not finite: load it in bfloat16 or float32 (teacher_model_kwargs)"
)


def _joined(parts: list[Any]) -> Any:
    """Join the results of several chunks."""
    if not parts:
        return None
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    columns = zip(*(asdict(part).values() for part in parts), strict=True)
    return type(parts[0])(*(np.concatenate(column) for column in columns))


def rounding(stored: TopK, vocabulary: int) -> float:
    """The probability that the codec moves, per target: half the sum of |exact - decoded|."""
    n, k = stored.ids.shape
    back = codec.decode_top_k(codec.encode_top_k(stored), n, k, vocabulary)
    moved = np.abs(np.exp(back.log_probs) - np.exp(stored.log_probs)).sum(1) / 2
    return round(float(moved.mean()), 6)


def _encoded(stored: Any, mine: slice) -> bytes:
    if stored is None:
        return b""
    if isinstance(stored, np.ndarray):
        return codec.encode_full(stored[mine])
    part = type(stored)(*(column[mine] for column in vars(stored).values()))
    if len(next(iter(vars(part).values()))) == 0:
        return b""
    return codec.encode_top_k(part) if isinstance(part, TopK) else codec.encode_sampled(part)


def _collator(task: Task, tokenizer: PreTrainedTokenizerBase | None) -> Any:
    if tokenizer is not None:
        return task_collator(task.key, tokenizer)
    if isinstance(task, CausalLM):
        return Collator(0, 0)  # padding is masked, so it may be any id
    raise InputError(
        f"rows for {task.name} are padded by the teacher's tokenizer, which is not known: give "
        "tokenizer, or data_collator"
    )


def _fingerprint(teacher: Any) -> int:
    model = getattr(teacher, "model", None)
    if model is not None:
        return model_hash(model)
    return int.from_bytes(hashlib.sha256(teacher.name.encode()).digest()[:8], "little")
