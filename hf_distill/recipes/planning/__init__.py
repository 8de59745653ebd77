"""`hf-distill plan`: estimate memory, time and disk of a recipe before it runs.

`trial` measures a few real steps on this machine, `arithmetic` computes memory for each engine.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_from_disk
from rich.box import SIMPLE_HEAD
from rich.table import Table

from hf_distill.errors import InputError
from hf_distill.recipes import Recipe, arguments
from hf_distill.recipes.planning.arithmetic import PARTS, Configuration, Measures, parts, possible
from hf_distill.recipes.planning.trial import measures_of, writes
from hf_distill.recipes.stages.models import teaches_itself
from hf_distill.recordings import TopK, codec
from hf_distill.reporting.formatting import LARGEST_SPREAD

__all__ = ["Plan", "make_plan", "memory_bytes"]

UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
GB = 1e9
ON_CPU = {"ddp.yaml": "cpu2.yaml", "zero2.yaml": "zero2_cpu.yaml", "zero3.yaml": "zero3_cpu.yaml"}


@dataclass(frozen=True)
class Plan:
    """The memory of each way to run on each of `devices`, and the first that fits.

    memory: bytes of a device; ways: bytes by part, by configuration
    steps, rows: steps of the training, rows of the prepared data; None if not known
    records, teaches_itself: whether the recipe records its teacher; whether the teacher is the
        student's own base
    off_policy: whether another distillation comes before the planned one
    """

    measures: Measures
    devices: int
    memory: float
    ways: Mapping[Configuration, Mapping[str, float]]
    steps: int | None
    rows: int | None
    baseline: bool
    length: int
    bytes_per_target: float
    records: bool = False
    teaches_itself: bool = False
    off_policy: bool = False

    @property
    def recommended(self) -> Configuration | None:
        """The first that fits, the fastest coming first."""
        return next((h for h, p in self.ways.items() if sum(p.values()) <= self.memory), None)

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together, if each is as fast as the measured one."""
        return self.devices * self.measures.tokens / self.measures.seconds

    @property
    def hours(self) -> float | None:
        """Of the distillation; a baseline takes at most as long again."""
        if self.steps is None:
            return None
        seconds = self.measures.seconds + self.measures.writing
        return self.steps * self.measures.accumulation * seconds / 3600

    def table(self) -> Table:
        """Memory by part, a row a configuration."""
        unit = "GB" if max(sum(of.values()) for of in self.ways.values()) >= 10 * GB else "MB"
        table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.add_column(f"{unit} on each device")
        for part in (*PARTS, "peak", ""):
            table.add_column(part, justify="right", no_wrap=True)
        for how, of in self.ways.items():
            total = sum(of.values())
            mark = "<- fits" if how == self.recommended else "" if total <= self.memory else "over"
            cells = [f"{size / UNITS[unit]:,.1f}" for size in (*(of[p] for p in PARTS), total)]
            table.add_row(how.name, *cells, mark)
        return table

    @property
    def advice(self) -> str:
        """What to do where nothing fits."""
        least = min(self.ways.values(), key=lambda of: sum(of.values()))
        found = (
            f"none of these fits into {_size(self.memory)}; the least takes "
            f"{_size(sum(least.values()))}"
        )
        if least["libraries"] >= self.memory:
            return (
                f"{found}, and the libraries alone {_size(least['libraries'])}: use devices with "
                "more memory"
            )
        return (
            f"{found}: use more devices, a smaller train.per_device_train_batch_size, or "
            "train.gradient_checkpointing=true"
        )

    def lines(self, recipe: str, overrides: Sequence[str] = ()) -> list[str]:
        """Further information, a sentence a line.

        recipe, overrides: as they were given, for the command to run
        """
        found = [
            f"speed: {self.measures.seconds:,.2f} s a micro-batch of {self.measures.tokens:,} "
            f"tokens on this machine, {self.tokens_per_second:,.0f} tokens/s on {self.devices} "
            "such devices, without communication"
        ]
        if self.measures.writing:
            found.append(
                f"writing: {self.measures.writing:,.2f} s more a micro-batch if all texts have "
                "train.max_new_tokens, less if they end earlier"
            )
        if self.measures.spread > LARGEST_SPREAD:
            found.append(
                f"the trial's steps differ by up to {self.measures.spread:.0%} of their median: "
                "probably other work was running, so speed and time may be far off; plan again"
            )
        if self.hours is None:
            found.append(
                "time: not known before the rows are prepared: start `hf-distill run`, which "
                "prepares them first, or set train.max_steps"
            )
        else:
            again = ", and at most as long again for the baseline" if self.baseline else ""
            again += "; off_policy comes before and is not counted" if self.off_policy else ""
            found.append(f"time: {self.steps:,} steps in {self.hours:,.2f} hours{again}")
        if self.rows is not None:
            size = self.rows * self.length * self.bytes_per_target
            found.append(
                f"recording: at most about {size / GB:,.2f} GB for {self.rows:,} rows, as "
                "prepared in the run folder, at "
                f"{self.bytes_per_target:,.0f} bytes a target (`hf-distill record --estimate` "
                "times a sample)"
            )
        else:
            found.append(
                f"recording: at most about {self.bytes_per_target:,.0f} bytes a target "
                f"({self.bytes_per_target:,.0f} GB for a billion tokens)"
            )
        how = self.recommended
        if how is None:
            return found
        placed = how.placement and not self.teaches_itself
        options = f" --set teacher.placement={how.placement}" if placed else ""
        options = " --set record.k=64" if how.recorded and not self.records else options
        options = "".join(f" --set {shlex.quote(o)}" for o in overrides) + options
        if how.file is None:
            found.append(f"{how.name}: hf-distill run {recipe}{options}")
        else:
            file = how.file if torch.cuda.is_available() else ON_CPU.get(how.file, how.file)
            found.append(
                f"{how.name}: accelerate launch --config_file recipes/accelerate/{file} "
                f"--num_processes {self.devices} recipes/distill.py {recipe}{options}"
            )
        return found


def _size(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def memory_bytes(text: str) -> float:
    """Bytes of "80GB"; InputError for what is no size."""
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(KB|MB|GB|TB)", text.strip().upper())
    if not found or float(found[1]) <= 0:
        raise InputError(f"memory is {text!r}, but must be a size such as 80GB or 512MB")
    return float(found[1]) * UNITS[found[2]]


def make_plan(recipe: Recipe, devices: int, memory: float) -> Plan:
    """Measure a few steps of the recipe here, and estimate them on other machines."""
    measures = measures_of(recipe, devices)
    cpu = not torch.cuda.is_available()
    possible_ways = possible(
        devices, recorded=recipe.record is not None, cpu=cpu, writes=writes(recipe)
    )
    ways = {how: parts(measures, how, devices, cpu=cpu) for how in possible_ways}
    rows = _rows(recipe)
    return Plan(
        measures=measures,
        devices=devices,
        memory=memory,
        ways=ways,
        steps=_steps(recipe, rows, devices, measures),
        rows=rows,
        baseline=recipe.baseline,
        length=recipe.data.max_length,
        bytes_per_target=_bytes_per_target(recipe),
        records=recipe.record is not None,
        teaches_itself=teaches_itself(recipe),
        off_policy=recipe.off_policy is not None,
    )


def _rows(recipe: Recipe) -> int | None:
    """Rows to train on, if they are prepared."""
    folder = Path(recipe.output_dir) / recipe.name / "data" / "train"
    if not folder.exists():
        return None
    rows, most = len(load_from_disk(str(folder))), recipe.record and recipe.record.max_rows
    return min(rows, most) if most else rows


def _steps(recipe: Recipe, rows: int | None, devices: int, measures: Measures) -> int | None:
    train: dict[str, Any] = arguments(recipe.train)
    if train.get("max_steps", -1) > 0:
        return train["max_steps"]
    if rows is None:
        return None
    batch = measures.tokens // recipe.data.max_length * measures.accumulation * devices
    return int(train.get("num_train_epochs", 3) * max(1, rows // batch))


def _bytes_per_target(recipe: Recipe) -> float:
    """Of the recipe's kind, for ids that are drawn evenly: real ones take less."""
    section, rng, n = recipe.record, np.random.default_rng(0), 256
    vocabulary = recipe.tokenizer.vocab_size or 50_000
    k = min(section.k if section else 64, vocabulary)
    if section and section.kind == "full":
        return 4.0 * vocabulary
    if section and section.kind == "sampled":
        return 1.4 * section.draws  # of 25 draws, the most a draw of those in docs/recording.md
    ids = np.sort(np.stack([rng.choice(vocabulary, k, replace=False) for _ in range(n)]), 1)
    log_probs = np.log(rng.dirichlet(np.ones(k), n) * 0.9 + 1e-9).astype(np.float32)
    tail = np.full(n, np.log(0.1), np.float32)
    said = TopK(ids, log_probs, tail, np.full(n, np.nan, np.float32))
    return len(codec.encode_top_k(said)) / n + 1
