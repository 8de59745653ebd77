"""On-policy rows: the student writes the completions that the teacher judges.

Before the targets of an optimizer step are counted, a share of its rows is replaced: the prompt of
the row stays, the student writes what follows. Counting, the objective and the fused head then see
a batch like any other. The student's own text carries no cross-entropy (`ce_weight` 0).

Which rows, and what is drawn, follows from seed, step and prompt alone: neither batch size,
accumulation, processes nor an interruption change it. Source: GKD, arXiv:2306.13649.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from hf_distill.errors import InputError, warn_once
from hf_distill.losses.targets import IGNORE
from hf_distill.models.base import base_model
from hf_distill.models.engines import is_sharded
from hf_distill.models.generation import Generator
from hf_distill.recordings.collator import ALL_NAMES
from hf_distill.tasks import TARGET_INDEX, CausalLM, Seq2SeqLM

# Prompts of similar length that are continued together.
ROWS_AT_A_TIME = 32
# So many steps in which nearly all texts were cut before the warning.
PATIENCE, NEARLY_ALL = 3, 0.9
# The entries of a batch that are made anew. Others cannot be: nobody knows how.
KNOWN = {"input_ids", "attention_mask", "labels", "ce_weight", "divergence_weight", TARGET_INDEX}
KNOWN |= {"decoder_input_ids", "decoder_attention_mask"}


@dataclass
class Figures:
    """What the student has written since the last log."""

    texts: int = 0
    tokens: int = 0
    cut: int = 0
    seconds: float = 0.0
    repeated: float = 0.0


@dataclass
class OnPolicy:
    """Replaces rows of a step by the student's own text.

    trainer: a `DistillationTrainer`
    """

    trainer: Any
    figures: Figures = field(default_factory=Figures)
    _steps_cut: int = 0

    def write(self, batches: Sequence[dict[str, Any]]) -> bool:
        """Replace rows in the micro-batches of one optimizer step, in place.

        returns: whether any row was replaced
        raises: InputError for rows or a trainer for which this is not possible
        """
        share = self.trainer.args.on_policy
        if not share or not batches:
            return False
        self._check(batches)
        rows = [self._rows(batch) for batch in batches]
        chosen = [row for of_batch in rows for row in of_batch if self._drawn(row, share)]
        start = time.perf_counter()
        self._continue(chosen)
        self.figures.seconds += time.perf_counter() - start
        for batch, of_batch in zip(batches, rows, strict=True):
            if any(row.written for row in of_batch):
                self._replace(batch, of_batch)
            elif batch.get("ce_weight") is None:  # all batches of a step have weights, or none has
                batch["ce_weight"] = torch.ones(len(of_batch), device=batch["input_ids"].device)
        return bool(chosen)

    def pop_figures(self) -> dict[str, float]:
        """What was written since the last call, of this process, for the log."""
        found, self.figures = self.figures, Figures()
        if not found.texts:
            return {}
        return {
            "written_tokens": found.tokens / found.texts,
            "written_cut": found.cut / found.texts,
            "written_repetition": found.repeated / found.texts,
            "writing_seconds": found.seconds,
        }

    # ---- Rows ----

    def _rows(self, batch: Mapping[str, Any]) -> list[Row]:
        """The rows of a padded batch, without padding."""
        ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
        mask = batch.get("attention_mask")
        masks = torch.ones_like(batch["input_ids"]).tolist() if mask is None else mask.tolist()
        found = []
        for number, (row, label, seen) in enumerate(zip(ids, labels, masks, strict=True)):
            real = [token for token, there in zip(row, seen, strict=True) if there]
            if self.encoder_decoder:
                wanted = [token for token in label if token != IGNORE]
                found.append(Row(number, real, wanted, real))
                continue
            wanted = [token for token, there in zip(label, seen, strict=True) if there]
            found.append(Row(number, real, wanted, self._prompt(real, wanted)))
        return found

    def _prompt(self, ids: list[int], labels: list[int]) -> list[int]:
        """What stands before the first target; of plain text the first `prompt_tokens`."""
        first = next((i for i, label in enumerate(labels) if label != IGNORE), len(ids))
        if first > 1:
            return ids[:first]
        return ids[: min(self.trainer.args.prompt_tokens, max(1, len(ids) - 1))]

    def _drawn(self, row: Row, share: float) -> bool:
        return self._number(row, "choose") < share * 2**63

    def _number(self, row: Row, purpose: str) -> int:
        """A number below 2**63 that follows from seed, step and prompt."""
        args, step = self.trainer.args, self.trainer.state.global_step
        text = f"{purpose} {args.seed} {step} ".encode()
        return xxhash.xxh3_64_intdigest(text + np.asarray(row.prompt, "<i4").tobytes()) >> 1

    # ---- Writing ----

    @property
    def encoder_decoder(self) -> bool:
        return isinstance(self.trainer._loss.task, Seq2SeqLM)

    @property
    def pad_token_id(self) -> int:
        """A token that every model has; what it pads is masked."""
        tokenizer = self.trainer.processing_class
        known = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
        return next((token for token in known if token is not None), 0)

    def _continue(self, rows: list[Row]) -> None:
        if not rows:
            return
        args, limit = self.trainer.args, self.trainer._loss.student.position_limit
        settings = {
            "do_sample": args.sampling_temperature > 0,
            "max_new_tokens": args.max_new_tokens,
            "num_beams": 1,
        }
        if args.sampling_temperature > 0:
            settings |= {
                "temperature": args.sampling_temperature, "top_p": args.top_p, "top_k": args.top_k,
            }  # fmt: skip
        order = sorted(rows, key=lambda row: (len(row.prompt), row.prompt))
        with self._writing() as model:
            for at in range(0, len(order), ROWS_AT_A_TIME):
                part = order[at : at + ROWS_AT_A_TIME]
                longest = max(len(row.prompt) for row in part)
                if limit is not None and not self.encoder_decoder:
                    room = limit - longest
                    if room < 1:
                        raise InputError(
                            f"a prompt has {longest} tokens, but the student has {limit} "
                            "positions, so that nothing can be written: cut the prompts shorter"
                        )
                    settings["max_new_tokens"] = min(args.max_new_tokens, room)
                generator = Generator(
                    model, settings, pad_token_id=self.pad_token_id,
                    autocast=self.trainer.accelerator.autocast,
                )  # fmt: skip
                seeds = [[self._number(row, "draw")] for row in part]
                texts = generator.texts([row.prompt for row in part], seeds)
                for row, (ids, finished) in zip(part, texts, strict=True):
                    row.completion, row.written = ids, True
                    self._count(ids, finished)
        self._warn(rows)

    @contextmanager
    def _writing(self) -> Iterator[Any]:
        """The student in eval mode; modes and the random state are afterwards as before."""
        model = self.trainer.model
        modes = [(module, module.training) for module in model.modules()]
        devices = [self.trainer.args.device] if self.trainer.args.device.type == "cuda" else []
        model.eval()
        try:
            with torch.random.fork_rng(devices):
                yield base_model(model) if not hasattr(model, "peft_config") else model
        finally:
            for module, training in modes:
                module.training = training

    def _count(self, ids: list[int], finished: bool) -> None:
        self.figures.texts += 1
        self.figures.tokens += len(ids)
        self.figures.cut += not finished
        pairs = list(pairwise(ids))
        self.figures.repeated += 1 - len(set(pairs)) / len(pairs) if pairs else 0.0

    def _warn(self, rows: list[Row]) -> None:
        length = self.trainer.args.max_new_tokens
        cut = sum(len(row.completion) >= length for row in rows) / len(rows)
        self._steps_cut = self._steps_cut + 1 if cut >= NEARLY_ALL else 0
        if self._steps_cut == PATIENCE:
            warn_once(
                "In %s steps nearly all texts of the student ran to max_new_tokens=%s without an "
                "end: raise it, or check that the student has learnt to stop.",
                PATIENCE,
                length,
            )

    # ---- Batches ----

    def _replace(self, batch: dict[str, Any], rows: list[Row]) -> None:
        """Pad the rows again, on the right, with the weights that they have now."""
        device = batch["input_ids"].device
        weight = batch.get("ce_weight")
        weights = [1.0] * len(rows) if weight is None else weight.tolist()
        ids, labels = [], []
        for row in rows:
            ids.append(row.ids if self.encoder_decoder else row.all_ids)
            labels.append(row.all_labels(self.encoder_decoder))
            if row.written:
                weights[row.number] = 0.0
        batch["input_ids"] = self._padded(ids, self.pad_token_id, device)
        batch["attention_mask"] = self._padded([[1] * len(row) for row in ids], 0, device)
        batch["labels"] = self._padded(labels, IGNORE, device)
        batch["ce_weight"] = torch.tensor(weights, dtype=torch.float32, device=device)
        for name in (TARGET_INDEX, "decoder_input_ids", "decoder_attention_mask"):
            batch.pop(name, None)

    @staticmethod
    def _padded(rows: list[list[int]], value: int, device: Any) -> Tensor:
        longest = max(1, *map(len, rows))
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows], device=device)

    def _check(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """InputError for what cannot be written on."""
        trainer, names = self.trainer, set(batches[0])
        if not isinstance(trainer._loss.task, CausalLM | Seq2SeqLM):
            raise InputError(
                f"on_policy needs a student that writes, not {trainer._loss.task.name}"
            )
        if trainer.teacher is None:
            raise InputError(
                "on_policy needs a live teacher to judge what the student writes: pass teacher="
            )
        if is_sharded(trainer.model_wrapped):
            raise InputError(
                "on_policy needs the student's weights whole on each process: use DDP or ZeRO-2 "
                "instead of ZeRO-3 or FSDP"
            )
        if names & set(ALL_NAMES):
            raise InputError(
                "on_policy replaces rows, and these have recordings of the teacher: leave out the "
                "recording, or set on_policy to 0"
            )
        if "position_ids" in names:
            raise InputError("on_policy needs one document a row: set packing to False")
        if further := sorted(names - KNOWN):
            raise InputError(
                f"on_policy makes rows anew and knows nothing of {further[0]!r}: leave out that "
                "column"
            )
        if batches[0].get("labels") is None:
            raise InputError("on_policy needs labels, before whose first the prompt stands")


@dataclass
class Row:
    """A row without padding.

    number: its place in the batch; ids, labels: of the data, for an encoder-decoder source and
        target; prompt: what the student continues
    """

    number: int
    ids: list[int]
    labels: list[int]
    prompt: list[int]
    completion: list[int] = field(default_factory=list)
    written: bool = False

    @property
    def all_ids(self) -> list[int]:
        return self.prompt + self.completion if self.written else self.ids

    def all_labels(self, encoder_decoder: bool) -> list[int]:
        """Prompt tokens are no targets."""
        if not self.written:
            return self.labels
        before = [] if encoder_decoder else [IGNORE] * len(self.prompt)
        return before + self.completion
