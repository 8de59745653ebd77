"""How a section of the GPU kit reports: one JSON line a case, written as soon as it is known.

    {"cases": 12}                    how many cases there are
    {"start": 0, "test": "..."}      a case begins
    {"done": 0, "test": "...", ...}  its result, with "error" where it has none

The lines are appended to the file GPU_ROWS. A worker that is started again, since a case killed it
or did not end, skips the cases before GPU_START. This module needs the standard library only.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# A worker's exit status when a case has broken its process: go on with the next case in a new one.
START_AGAIN = 75


def first_case() -> int:
    """The number of the first case that this process runs."""
    return int(os.environ.get("GPU_START", "0"))


def write(**fields: Any) -> None:
    """Append one line; numbers that JSON has no word for become null."""
    plain = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in fields.items()
    }
    line = json.dumps(plain, default=str)
    if path := os.environ.get("GPU_ROWS"):
        with Path(path).open("a") as file:
            file.write(line + "\n")
    else:
        print(line, flush=True)


def device_is_broken() -> bool:
    """Whether the device answers with an error, as after an illegal access in a kernel."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def run_cases(
    cases: Sequence[Mapping[str, Any]], work: Callable[[Mapping[str, Any]], Mapping[str, Any]]
) -> None:
    """Run each case; one that fails leaves its error and does not end the others."""
    write(cases=len(cases))
    for number in range(first_case(), len(cases)):
        case = cases[number]
        write(start=number, **case)
        try:
            found = work(case)
        except Exception as error:
            text = " ".join(str(error).split())
            print(f"{case}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            found = {"error": f"{type(error).__name__}: {text[:300]}"}
        write(done=number, **case, **found)
        if "error" in found and device_is_broken():
            sys.exit(START_AGAIN)
