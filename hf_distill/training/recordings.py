"""Find the recordings in the data sets of a trainer."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from hf_distill.errors import InputError
from hf_distill.recordings.reader import first_header
from hf_distill.recordings.row_format import Header
from hf_distill.training.arguments import DistillationArguments


def find_recordings(
    args: DistillationArguments, given: Mapping[str, Any], *, has_teacher: bool
) -> Header | None:
    """The header of the recordings in a trainer's data sets; None where no set has one.

    given: the trainer's keyword arguments
    raises: InputError for a set that has neither a recording nor a teacher, where alpha is above 0,
        and for sets that were recorded in different ways
    """
    train, evaluation, alpha = given.get("train_dataset"), given.get("eval_dataset"), args.alpha
    named = evaluation if isinstance(evaluation, Mapping) else {"": evaluation}
    sets = {"train_dataset": train}
    sets |= {f"eval_dataset[{n!r}]" if n else "eval_dataset": rows for n, rows in named.items()}
    found = {name: first_header(rows, name) for name, rows in sets.items()}
    for name, rows in sets.items():
        untaught = found[name] is None and (rows is not None or not any(found.values()))
        if alpha > 0 and not has_teacher and untaught:
            raise InputError(
                f"alpha is {alpha}, but {name} has no recorded teacher and no teacher was given: "
                "pass teacher=, give rows made by hf_distill.record, or set alpha to 0 for plain "
                "fine-tuning"
            )
    headers = {name: header for name, header in found.items() if header is not None}
    _refuse_different(headers, mixed=args.mixed_recordings)
    return next(iter(headers.values()), None)


def _refuse_different(headers: Mapping[str, Header], *, mixed: bool) -> None:
    """InputError for sets that were recorded in different ways, since one collator reads all."""
    fields = ("kind", "k", "temperature", "vocabulary", *(() if mixed else ("teacher",)))
    for (first, expected), (name, header) in pairwise(headers.items()):
        for field in fields:
            found, wanted = getattr(header, field), getattr(expected, field)
            if found != wanted:
                shown = [f"{x:016x}" if field == "teacher" else str(x) for x in (found, wanted)]
                raise InputError(
                    f"{name} was recorded with {field} {shown[0]}, but {first} with {shown[1]}: "
                    "record both alike"
                )
