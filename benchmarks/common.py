"""Each variant in a process of its own, in turn, round after round; medians, peaks, one table."""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_distill.losses.linear_head import IDS_PER_SLICE as IDS

MB = 2**20


CHUNK = 512  # rows at a time: the fastest of 342, 410, 512 and 683 within its memory
CUDA_CHUNK = 2048
SLICE = 4096
# How many ids' logits a call makes: all of them, or as many as ours makes in float32.
FLOORS = {"floor": None, "floor_sliced": IDS}


@torch.no_grad()
def four_products(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    slices: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits of both, gradient of the hidden states, of the head in float32; chunk by chunk.

    slices: how many ids' logits one call makes, all where it is not given
    """
    n, ids = len(hidden), len(weight)
    rows = min(CUDA_CHUNK if hidden.is_cuda else CHUNK, n)
    # Rows of a multiple of 64 ids in memory let CUDA's products use wide loads.
    stride = -(-ids // 64) * 64 if hidden.is_cuda else ids
    ours, theirs = (hidden.new_empty(rows, stride)[:, :ids] for _ in range(2))
    widens = hidden.is_cuda and "dtype_out" in torch.ops.aten.addmm.overloads()
    d_hidden = torch.empty_like(hidden)
    d_weight = torch.empty(weight.shape, device=weight.device)
    narrow = hidden.new_empty(min(SLICE, ids), hidden.shape[1])
    for at in range(0, n, rows):
        chunk = slice(at, min(at + rows, n))
        z, p = ours[: chunk.stop - at], theirs[: chunk.stop - at]
        for v in range(0, ids, slices or ids):
            part = slice(v, v + (slices or ids))
            torch.mm(hidden[chunk], weight[part].t(), out=z[:, part])
            torch.mm(teacher_hidden[chunk], teacher_weight[part].t(), out=p[:, part])
        torch.mm(z, weight, out=d_hidden[chunk])
        if d_weight.dtype == z.dtype:
            torch.addmm(d_weight, z.t(), hidden[chunk], beta=float(at > 0), out=d_weight)
            continue
        if widens:
            added = {"beta": float(at > 0), "out_dtype": d_weight.dtype, "out": d_weight}
            torch.addmm(d_weight, z.t(), hidden[chunk], **added)
            continue
        for v in range(0, ids, SLICE):  # float32 sums of bfloat16 products
            part = slice(v, v + SLICE)
            columns = z[:, part].t()
            product = torch.mm(columns, hidden[chunk], out=narrow[: len(columns)])
            d_weight[part].add_(product) if at else d_weight[part].copy_(product)
    return d_hidden, d_weight


class Missing(Exception):
    """A peer that is not installed."""


def memory_mb(field: str) -> float:
    """VmRSS (resident now) or VmHWM (its peak) of this process. Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"{field} is not in /proc/self/status")


def forget_peak() -> None:
    """Start the peak afresh."""
    Path("/proc/self/clear_refs").write_text("5")


def timed(work: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Extra memory of the first call, median seconds of those after it."""
    gc.collect()
    forget_peak()
    before = memory_mb("VmRSS")
    work()
    extra = memory_mb("VmHWM") - before
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "extra_mb": extra}


def in_turn(
    script: str, variants: list[str], options: dict[str, Any], rounds: int
) -> list[dict[str, Any]]:
    """One row a variant: the median over rounds, and the least and most of them."""
    found: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
    for number in range(rounds):
        for variant in variants:
            print(f"round {number + 1} of {rounds}: {variant} ...", file=sys.stderr, flush=True)
            words = [sys.executable, script, "--worker", variant]
            words += [f"--{k.replace('_', '-')}={v}" for k, v in options.items()]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{variant} failed:\n{done.stderr[-3000:]}")
            found[variant].append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for variant, results in found.items():
        if "missing" in results[0]:
            rows.append({"variant": variant, **results[0]})
            continue
        row = {"variant": variant, **results[0]}
        for key in ("seconds", "extra_mb", "peak_mb"):
            if key in row:
                values = [result[key] for result in results]
                row[key] = round(statistics.median(values), 4)
                row[f"{key}_range"] = [round(min(values), 4), round(max(values), 4)]
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Ratios to the variant `floor`, one row a line."""
    floor = next((row["seconds"] for row in rows if row["variant"] == "floor"), None)
    for row in rows:
        if floor and "seconds" in row:
            row["ratio_to_floor"] = round(row["seconds"] / floor, 3)
        if as_json:
            print(json.dumps(row), flush=True)
        elif "missing" in row:
            print(f"{row['variant']:<14} missing: {row['missing']}")
        else:
            memory = "peak_mb" if "peak_mb" in row else "extra_mb"
            low, high = row["seconds_range"]
            learnt = (
                ""
                if row["loss"] is None
                else (f"  loss {row['loss']:.5f}  gradient {row['grad_norm']:.6f}")
            )
            print(
                f"{row['variant']:<14} {row['dtype']:<9} T={row['temperature']:<4} "
                f"{row['seconds']:8.3f} s ({low:.3f} to {high:.3f})  "
                f"{row.get('ratio_to_floor', float('nan')):6.2f} x floor  "
                f"{row[memory]:7.0f} MB{learnt}",
                flush=True,
            )


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON row a line")
    parser.add_argument("--rounds", type=int, default=3, help="how often each variant has its turn")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


def answer(work: Callable[[], dict[str, Any]]) -> None:
    """What a worker process finds, as its last line."""
    try:
        print(json.dumps(work()))
    except Missing as missing:
        print(json.dumps({"missing": str(missing)}))
