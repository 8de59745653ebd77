"""What the Triton kernels compile to: registers, spills and bytes moved, without a GPU.

    python benchmarks/kernel_static.py            a table
    python benchmarks/kernel_static.py --json     one JSON object a line
    python benchmarks/kernel_static.py --quick    training in bfloat16 at T = 1 only

Each launch of `TritonKernel` is compiled for compute capability 8.0 (A100), 9.0 (H100) and 10.0
(B200). A row has

    variant             teacher, divergence, dtype, and the other branches taken
    arch                compute capability times ten
    registers           of a thread, of at most 255
    spills              bytes of a thread in local memory, for what did not fit into registers
    shared_bytes        shared memory of a program
    bytes_per_logit     read and written in the loops over whole blocks, for one id of one target
    launches_per_chunk  kernels started for a chunk of targets
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # what the interpreter runs cannot be compiled

import torch
import triton
from triton.backends.compiler import GPUTarget

from hf_distill.losses import Logits, Sampled, TopK, Weights
from hf_distill.losses.divergences import DIVERGENCES, named_divergence
from hf_distill.losses.kernels import triton as launcher
from hf_distill.losses.linear_head import LogitTransform

ARCHITECTURES = (80, 90, 100)
ROWS, IDS, RECORDED = 4, 4096, 64  # compiled code depends on the divisibility of IDS only
BYTES = {"bf16": 2, "f16": 2, "f32": 4}
Variant = dict[str, Any]


def variants(quick: bool) -> Iterator[Variant]:
    """The branches that a training or an evaluation takes."""
    common = {"dtype": torch.bfloat16, "temperature": 1.0}
    names = list(DIVERGENCES)
    for name in names:
        for teacher in ("logits", "top-k"):
            yield {"teacher": teacher, "divergence": name, **common}
    yield {"teacher": "draws", "divergence": "forward_kl", **common}
    yield {"teacher": "none", **common}
    if quick:
        return
    for name, dtype in product(names, (torch.float16, torch.float32)):
        yield {"teacher": "logits", "divergence": name, "dtype": dtype, "temperature": 1.0}
    extras = ({"temperature": 2.0}, {"capped": True}, {"weights": "each"}, {"gradient": False})
    for name, extra in product(names, extras):
        yield {"teacher": "logits", "divergence": name, **common, **extra}
    for teacher, extra in product(("top-k", "draws", "none"), extras):
        yield {"teacher": teacher, "divergence": "forward_kl", **common, **extra}


def label(variant: Variant) -> str:
    words = [variant["teacher"], variant.get("divergence", ""), str(variant["dtype"])[6:]]
    words += [f"{key} {value}" for key, value in variant.items() if key in ("weights", "gradient")]
    words += [f"T {variant['temperature']:g}"] + ["soft-capped"] * ("capped" in variant)
    return ", ".join(filter(None, words))


def compiled(variant: Variant, arch: int) -> list[Any]:
    """The kernels that a chunk launches, compiled for the architecture instead of run."""
    found: list[Any] = []

    class Compile:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            return lambda **given: found.append(self.kernel.warmup(grid=grid, **given))

    driver = SimpleNamespace(
        get_current_device=lambda: arch,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
    )
    triton.runtime.driver.set_active(driver)
    names = ("dense_kernel", "sparse_kernel")
    patches = {name: Compile(getattr(launcher, name)) for name in names}
    with mock.patch.multiple(launcher, **patches):
        launch(variant)
    return found


def launch(variant: Variant) -> None:
    each = torch.ones(ROWS, 1) if variant.get("weights") == "each" else 0.5
    function = named_divergence(variant.get("divergence", "forward_kl"))
    transform = LogitTransform(1.0, 30.0 if variant.get("capped") else None)
    logits = torch.zeros(ROWS, IDS, dtype=variant["dtype"])
    ids, some = torch.zeros(ROWS, RECORDED, dtype=torch.int64), torch.zeros(ROWS, RECORDED)
    teacher = {
        "none": None,
        "logits": Logits(logits.clone()),
        "top-k": TopK(ids, some, torch.zeros(ROWS)),
        "draws": Sampled(ids, some, torch.zeros(ROWS)),
    }[variant["teacher"]]
    launcher.TritonKernel()(
        logits, torch.zeros(ROWS, dtype=torch.int64), teacher,
        Weights(each, each, variant["temperature"], function, IDS),
        transform=transform, teacher_transform=transform,
        gradient=variant.get("gradient", True),
    )  # fmt: skip


def resources(kernel: Any) -> dict[str, int]:
    """Registers and local memory, as the tool of the CUDA toolkit that Triton brings reads them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [str(tool), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return {"registers": used["REG"], "spills": used["STACK"] + used["LOCAL"]}


def bytes_per_logit(kernel: Any) -> int:
    """Loads and stores without a mask are those of the loops over whole blocks."""
    moved = re.findall(r"tt\.(?:load|store) [^,]*?(?:, %\w+)? : tensor<\d+x!tt\.ptr<(\w+)>>",
                       kernel.asm["ttir"])  # fmt: skip
    return sum(BYTES[name] for name in moved if name in BYTES)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--json", action="store_true", help="one JSON object a line")
    options.add_argument("--quick", action="store_true", help="training in bfloat16 at T = 1 only")
    given = options.parse_args()
    for variant, arch in product(variants(given.quick), ARCHITECTURES):
        kernels = compiled(variant, arch)
        rows = [resources(kernel) for kernel in kernels]
        row = {
            "variant": label(variant),
            "arch": arch,
            "registers": max(row["registers"] for row in rows),
            "spills": max(row["spills"] for row in rows),
            "shared_bytes": max(kernel.metadata.shared for kernel in kernels),
            "bytes_per_logit": sum(bytes_per_logit(kernel) for kernel in kernels),
            "launches_per_chunk": len(kernels),
        }
        if given.json:
            print(json.dumps(row), flush=True)
        else:
            numbers = "".join(f"{value:>6}" for key, value in row.items() if key != "variant")
            print(f"{row['variant']:<58}{numbers}", flush=True)


if __name__ == "__main__":
    main()
