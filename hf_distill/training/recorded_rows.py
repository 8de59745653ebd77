"""The part of `DistillationTrainer` that lets rows bring their own teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase, Trainer

from hf_distill.errors import InputError
from hf_distill.losses.divergences import Divergence
from hf_distill.recordings.collator import ALL_NAMES, RecordingCollator
from hf_distill.recordings.reader import check_recording, first_header, without_recording
from hf_distill.recordings.row_format import COLUMN, Header, tokenizer_hash
from hf_distill.training.arguments import DistillationArguments


class RecordedRowsMixin(Trainer):
    """A recording in a row is used; else the live teacher; else the data set is refused."""

    args: DistillationArguments
    teacher: Any
    _recorded: Header | None
    _signature_columns: Any

    def choose_divergence(self) -> Divergence:
        raise NotImplementedError

    def _find_recordings(
        self, args: DistillationArguments, *, train_dataset: Any, eval_dataset: Any
    ) -> Header | None:
        """What the rows say of their recordings; refuses a set that nobody teaches."""
        evaluated = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
        sets = {"the training set": train_dataset}
        sets |= {
            f"the evaluation set {name!r}" if name else "the evaluation set": rows
            for name, rows in evaluated.items()
        }
        found = {name: first_header(rows, name) for name, rows in sets.items()}
        for name, rows in sets.items():
            if (
                args.alpha > 0
                and self.teacher is None
                and found[name] is None
                and (rows is not None or not any(found.values()))
            ):
                raise InputError(
                    f"alpha is {args.alpha}, but {name} has nobody to learn from: pass teacher=, "
                    "give rows that hf_distill.record has made, or set alpha to 0 for plain "
                    "fine-tuning"
                )
        headers = {name: header for name, header in found.items() if header is not None}
        _refuse_unlike(headers, mixed=args.mixed_recordings)
        return next(iter(headers.values()), None)

    def _read_recordings(self, header: Header, student_rows: int) -> None:
        """Let batches bring what their rows' recordings hold."""
        check_recording(
            header,
            "the data set",
            temperature=self.args.temperature,
            divergence=self.choose_divergence(),
            student_rows=student_rows,
        )
        tokenizer = self.processing_class
        known = isinstance(tokenizer, PreTrainedTokenizerBase)
        expected = replace(header, tokenizer=tokenizer_hash(tokenizer if known else None))
        self.data_collator = RecordingCollator(
            self.data_collator, expected, mixed=self.args.mixed_recordings
        )

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Trainer rounds what a batch holds to the model's dtype under DeepSpeed; not this."""
        device = self.args.device
        recorded = {name: inputs[name].to(device) for name in inputs.keys() & ALL_NAMES}
        return {**super()._prepare_inputs(without_recording(inputs)), **recorded}

    def _set_signature_columns_if_needed(self) -> None:
        """Trainer drops columns that the model does not take; recordings go to the collator."""
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if self._recorded is not None and COLUMN not in columns:
            columns.append(COLUMN)


def _refuse_unlike(headers: Mapping[str, Header], *, mixed: bool) -> None:
    """One collator reads all sets, so that they must have been recorded in one way."""
    alike = ("kind", "k", "temperature", "vocabulary", *(() if mixed else ("teacher",)))
    for (first, expected), (name, header) in pairwise(headers.items()):
        for field in alike:
            found, wanted = getattr(header, field), getattr(expected, field)
            if found != wanted:
                shown = [f"{x:016x}" if field == "teacher" else str(x) for x in (found, wanted)]
                raise InputError(
                    f"{name} was recorded with {field} {shown[0]}, but {first} with {shown[1]}: "
                    "record both alike"
                )
