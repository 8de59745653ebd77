"""The output head on a GPU, beside PyTorch, compiled PyTorch, Liger and TRL at their defaults.

CE and forward KL at weight 1/2 each, T = 1, forward and backward; the competitors are those of
`head.py`. `floor` is the four matrix products. Student and teacher have the same width. The most
important cases come first, since the section has a time limit.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from common import Missing
from gpu_machine import copy_gb_s
from gpu_rows import run_cases
from gpu_timing import device, free_memory, timed_on_device
from head import FUNCTIONS, TOLERANCE, Problem, floor, norm

QUICK = ["floor", "plain", "ours", "trl"]
# They compile anew for each shape, which takes longer than all of their calls.
COMPILING = ["compiled", "liger"]
# Values of eager PyTorch by case, to compare with.
EXPECTED: dict[tuple[Any, ...], tuple[float, float]] = {}


def cases() -> list[dict[str, Any]]:
    """Every (case, variant), the most important first."""
    if device().type == "cpu":
        shape = {"vocab": 257, "targets": 64, "width": 32}
        pairs = product(("bfloat16", "float32"), [*QUICK, *COMPILING])
        return [{"dtype": dtype, **shape, "variant": variant} for dtype, variant in pairs]
    grid = product(("bfloat16", "float32"), (151936, 50257), (8192, 32768, 2048), (1024, 4096))
    found = []
    for dtype, vocab, targets, width in grid:
        case = {"dtype": dtype, "vocab": vocab, "targets": targets, "width": width}
        main = dtype == "bfloat16" and targets == 8192
        first = main and vocab == 151936
        # float32 at the larger width takes seconds a call.
        slow = dtype == "float32" and width == 4096
        for variant in QUICK:
            found.append((0 if first else 3 if slow else 1, case | {"variant": variant}))
        for variant in COMPILING:
            found.append((0 if first else 2 if main else 4, case | {"variant": variant}))
    return [case for _, case in sorted(found, key=lambda pair: pair[0])]


def run(case: Mapping[str, Any]) -> dict[str, Any]:
    """Time one variant of one case, and compare its values with those of eager PyTorch."""
    free_memory()
    torch.compiler.reset()
    options = {"teacher_width": case["width"], "temperature": 1.0, "divergence": "forward_kl"}
    problem = Problem(argparse.Namespace(**case, **options, device=device()))
    if case["variant"] == "floor":
        found = timed_on_device(lambda: floor(problem))
        return found | {"copy_gb_s": RATE}
    try:
        found = timed_on_device(lambda: problem.work(FUNCTIONS[case["variant"]]))
    except Missing as missing:
        return {"error": f"not installed: {missing}"}
    values = problem.loss.item(), norm(problem.slopes)
    found |= {"loss": values[0], "grad_norm": values[1], "copy_gb_s": RATE}
    key = tuple(case[name] for name in ("dtype", "vocab", "targets", "width"))
    if case["variant"] == "plain":
        EXPECTED[key] = values
    # TRL's kernel has no cross-entropy.
    if key in EXPECTED and case["variant"] != "trl":
        pairs = zip(values, EXPECTED[key], strict=True)
        found["agrees"] = all(abs(a - b) <= TOLERANCE[case["dtype"]] * abs(b) for a, b in pairs)
    return found


if __name__ == "__main__":
    RATE = copy_gb_s(1024 if device().type == "cuda" else 1)
    run_cases(cases(), run)
