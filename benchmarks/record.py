"""Recorded teachers: the training step, the recording itself, bytes against quality.

    python benchmarks/record.py                                  steps and recording speed
    python benchmarks/record.py --run runs/v50k                  and bytes against quality
    python benchmarks/record.py --small                          in seconds, to see that it works

`step`: gpt2 on 2 rows of 512 tokens, float32, real trainers, decoding in the main process: plain
Trainer (`sft`), ours with alpha 0, ours from a recording. `forward`: a gpt2-medium-sized teacher's
plain forward against `record` on the same rows. `quality`: what the codec does to the
gradient by the logits of a trained student, beside the full distribution, on the held-out
rows of a run folder with a trained teacher and baseline. `scale`: ten times more rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import answer, forget_peak, in_turn, memory_mb, parser
from datasets import Dataset, load_from_disk
from step import Clock
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_distill import (
    DistillationArguments,
    DistillationTrainer,
    divergences,
    load_recording,
    record,
)
from hf_distill.data import Collator
from hf_distill.losses.kernels.torch import value_and_gradient
from hf_distill.losses.signals import Sampled, TopK
from hf_distill.losses.weights import Weights
from hf_distill.recordings import codec
from hf_distill.recordings.collator import _with_label
from hf_distill.recordings.extract import sampled, top_k_

SHAPES = {
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "tiny": {"n_embd": 64, "n_layer": 1, "n_head": 2},
}
COLLATE = Collator(0, 0)


def model(shape: str, vocabulary: int, seed: int) -> GPT2LMHeadModel:
    set_seed(seed)
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **SHAPES[shape], **none))


def rows(number: int, length: int, vocabulary: int) -> Dataset:
    generator = np.random.default_rng(0)
    ids = generator.integers(0, vocabulary, (number, length)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def step(variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a training step, and the peak of the process."""
    data = rows(2 * (options.repeats + 2), options.length, options.vocabulary)
    common: dict[str, Any] = {
        "max_steps": options.repeats + 2,
        "per_device_train_batch_size": 2,
        "use_cpu": not torch.accelerator.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
    }
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        if variant == "recorded":
            # In a process of its own, so that its memory does not count here.
            words = [sys.executable, *sys.argv, "--worker=write", f"--folder={folder}/r"]
            subprocess.run(words, check=True, capture_output=True)
            data = load_recording(Path(folder) / "r")
        student = model(options.student, options.vocabulary, 0)
        given: dict[str, Any] = {"train_dataset": data, "data_collator": COLLATE}
        forget_peak()
        if variant == "sft":
            trainer: Any = Trainer(student, TrainingArguments(folder, **common), **given)
        else:
            alpha = 0.5 if variant == "recorded" else 0.0
            args = DistillationArguments(folder, alpha=alpha, **common)
            trainer = DistillationTrainer(student, None, args, **given)
        trainer.add_callback(clock)
        # Trainer fetches a batch before the step begins; decoding must be in the figure.
        fetch, waited = trainer.get_batch_samples, []

        def timed_fetch(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            batch = fetch(*args, **kwargs)
            waited.append(time.perf_counter() - start)
            return batch

        trainer.get_batch_samples = timed_fetch
        trainer.train()
        seconds = [a + b for a, b in zip(clock.seconds, waited, strict=False)]
        fetching = statistics.median(waited[2 : options.repeats + 2])
        return {
            "seconds": statistics.median(seconds[2:]),
            "fetch_seconds": fetching,
            "peak_mb": memory_mb("VmHWM"),
        }


def write(options: argparse.Namespace) -> dict[str, Any]:
    """The recording that a step reads; what its teacher says does not matter for speed."""
    teacher = model("tiny", options.vocabulary, 1)
    data = rows(2 * (options.repeats + 2), options.length, options.vocabulary)
    settings = {"kind": options.kind, "k": options.k}
    record(data, teacher, options.folder, data_collator=COLLATE, batch_size=2, **settings)
    return settings


def forward(variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """Targets a second of a teacher's plain forward, and of recording it."""
    teacher = model(options.teacher, options.vocabulary, 1).eval()
    data = rows(2 * options.repeats, options.length, options.vocabulary)

    def plain() -> None:
        for at in range(0, len(data), 2):
            batch = COLLATE([data[at], data[at + 1]])
            with torch.no_grad():
                teacher(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

    def recording() -> None:
        with tempfile.TemporaryDirectory() as folder:
            record(
                data, teacher, Path(folder) / "r", kind=options.kind, k=options.k,
                data_collator=COLLATE, batch_size=2,
            )  # fmt: skip

    work = plain if variant == "forward" else recording
    work()
    start = time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - start, "peak_mb": memory_mb("VmHWM")}


def scale(options: argparse.Namespace) -> dict[str, Any]:
    """Memory of recording and of reading in random order, and the time a row takes."""
    data = rows(options.rows, 64, 2000)
    with tempfile.TemporaryDirectory() as folder:
        made = record(data, model("tiny", 2000, 1), Path(folder) / "r", data_collator=COLLATE)
        recording_mb = memory_mb("VmRSS")
        order = np.random.default_rng(0).permutation(len(made))[:500].tolist()
        start = time.perf_counter()
        for index in order:
            made[index]
        seconds = (time.perf_counter() - start) / len(order)
    return {"rows": len(data), "resident_mb": recording_mb, "read_us_per_row": 1e6 * seconds}


# ---- Bytes against quality ----


@torch.no_grad()
def trained_pair(run: Path, targets: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of teacher and baseline at some held-out targets, and the labels."""
    data = load_from_disk(str(run / "data" / "eval"))
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(run / role).float().eval()
        for role in ("teacher", "baseline")
    )
    found: list[list[torch.Tensor]] = [[], [], []]
    for row in data.shuffle(seed=0):
        ids = torch.tensor([row["input_ids"]])
        found[0].append(teacher(ids).logits[0, :-1])
        found[1].append(student(ids).logits[0, :-1])
        found[2].append(torch.tensor(row["labels"])[1:])
        if sum(map(len, found[2])) >= targets:
            break
    theirs, ours, labels = (torch.cat(parts)[:targets] for parts in found)
    kept = labels >= 0
    return theirs[kept], ours[kept], labels[kept]


def gradient(ours: torch.Tensor, labels: torch.Tensor, signal: Any) -> torch.Tensor:
    """Of the forward KL by the student's logits."""
    weights = Weights(0.0, 1.0, 1.0, divergences.forward_kl, ours.shape[1])
    return value_and_gradient(ours.clone(), labels, signal, weights)[1]


def sparse(content: codec.TopK, labels: torch.Tensor) -> TopK:
    ids, log_probs = _with_label(content, labels.numpy())
    return TopK(*map(torch.from_numpy, (ids, np.float32(log_probs), np.array(content.log_tail))))


def polynomial(theirs: torch.Tensor, k: int, exact: int, powers: list[float]) -> TopK:
    """DistillKit's format, from its description: the largest log-probabilities in bfloat16, the
    others by a polynomial of their rank, fitted for each target, coefficients in float32. It keeps
    no tail; here it is given what the named probabilities leave.
    """
    log_probs, ids = theirs.log_softmax(-1).topk(k)
    rank = torch.arange(exact, k, dtype=torch.float64) / k
    basis = torch.stack([rank**power for power in powers], 1)
    solved = torch.linalg.lstsq(basis, log_probs[:, exact:].double().T).solution
    fitted = (basis @ solved.float().double()).T.float()
    named = torch.cat([log_probs[:, :exact].bfloat16().float(), fitted], 1)
    left = 1 - named.exp().sum(-1)
    excess = (-left).clamp(min=0)
    named = named - torch.log1p(excess)[:, None]
    return TopK(ids, named, left.clamp(min=1e-7).log())


def quality(run: Path, targets: int) -> Iterator[dict[str, Any]]:
    theirs, ours, labels = trained_pair(run, targets)
    n, vocabulary = theirs.shape
    exact = gradient(ours, labels, theirs.clone())
    header = 48 / 512  # of a row of 512 targets

    def row(variant: str, kind: str, k: int, size: float | None, signal: Any) -> dict[str, Any]:
        found = gradient(ours, labels, signal)
        error = float((found - exact).norm() / exact.norm())
        cosine = float((found * exact).sum() / found.norm() / exact.norm())
        told = {"variant": variant, "kind": kind, "k": k, "vocabulary": vocabulary}
        told |= {"bytes_per_token": None if size is None else round(size, 1), "targets": n}
        return told | {
            "gradient_cosine": round(cosine, 5), "gradient_relative_error": round(error, 5)
        }  # fmt: skip

    for k in (8, 16, 32, 64, 128, 256):
        content = top_k_(theirs.clone(), labels, k)
        data = codec.encode_top_k(content)
        back = codec.decode_top_k(data, n, k, vocabulary)
        size = len(data) / n + header
        ids = sum(part.nbytes for part in codec._rice(
            (np.diff(content.ids, axis=1, prepend=-1) - 1).ravel(), codec._quarters(n, k), 4 * n
        ))  # fmt: skip
        exactly = row("exact values", "top_k", k, None, sparse(content, labels))
        coded = row("codec", "top_k", k, size, sparse(back, labels))
        coded["bytes_of_ids"] = round(ids / n, 1)
        coded["error_ratio_to_exact_values"] = round(
            coded["gradient_relative_error"] / exactly["gradient_relative_error"], 3
        )
        yield exactly
        yield coded
    for k, top, powers in ((128, 16, [0, 1, 2, 3, 4, 0.5]), (50, 1, [0, 1, 0.5])):
        size = 2 * k + 2 * top + 4 * len(powers)
        yield row("polynomial", "top_k", k, size, polynomial(theirs, k, top, powers))
    generator = torch.Generator().manual_seed(0)
    for draws in (25, 50, 100, 200):
        parts = [sampled(part, draws, generator) for part in theirs.split(256)]
        said = type(parts[0])(
            *(np.concatenate(c) for c in zip(*(asdict(p).values() for p in parts), strict=True))
        )
        data = codec.encode_sampled(said)
        signal = Sampled(
            torch.from_numpy(said.ids),
            torch.from_numpy((said.counts / draws).astype(np.float32)),
            torch.from_numpy(said.entropy),
        )
        yield row("codec", "sampled", draws, len(data) / n + header, signal)


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Bytes against the gradient's error, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for label, variant, kind, style in (
        ("top_k", "codec", "top_k", "o-"),
        ("sampled", "codec", "sampled", "s-"),
        ("DistillKit's format, simulated", "polynomial", "top_k", "^"),
    ):
        rows = [r for r in found if r["variant"] == variant and r["kind"] == kind]
        points = [(r["bytes_per_token"], r["gradient_relative_error"]) for r in rows]
        axes.plot(*zip(*points, strict=True), style, label=label)
        for (x, y), r in zip(points, rows, strict=True):
            axes.annotate(r["k"], (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="bytes a target, everything included")
    axes.set_ylabel("error of the gradient, relative")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.savefig(path)


def tell(row: dict[str, Any], as_json: bool) -> None:
    shown = row if as_json else {k: v for k, v in row.items() if k != "seconds_range"}
    print(json.dumps(shown) if as_json else "  ".join(f"{k} {v}" for k, v in shown.items()))


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--run", type=Path, help="a run folder with teacher and baseline")
    arguments.add_argument("--plot", type=Path, help="with --run: an SVG of bytes against error")
    arguments.add_argument("--targets", type=int, default=2000)
    arguments.add_argument(
        "--part", default="step,forward,scale", help="which of step, forward and scale"
    )
    arguments.add_argument("--vocabulary", type=int, default=50257)
    arguments.add_argument("--student", default="gpt2", choices=SHAPES)
    arguments.add_argument("--teacher", default="gpt2-medium", choices=SHAPES)
    arguments.add_argument("--length", type=int, default=512)
    arguments.add_argument("--kind", default="top_k")
    arguments.add_argument("--k", type=int, default=64)
    arguments.add_argument("--repeats", type=int, default=4)
    arguments.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    arguments.add_argument("--folder", help=argparse.SUPPRESS)
    arguments.add_argument("--small", action="store_true", help="tiny models, one round")
    options = arguments.parse_args()
    if options.worker == "write":
        answer(lambda: write(options))
        return
    if options.worker == "scale":
        answer(lambda: scale(options))
        return
    if options.worker:
        part = forward if options.worker in ("forward", "record") else step
        answer(lambda: part(options.worker, options))
        return
    if options.small:
        options.student = options.teacher = "tiny"
        options.rounds, options.length, options.repeats = 1, 64, 2
    names = ("student", "teacher", "length", "kind", "k", "repeats", "vocabulary")
    passed = {name: getattr(options, name) for name in names}
    described = {"kind": options.kind, "k": options.k, "vocabulary": options.vocabulary}
    if "step" in options.part:
        found = in_turn(__file__, ["sft", "alpha0", "recorded"], passed, options.rounds)
        seconds = {row["variant"]: row["seconds"] for row in found}
        peaks = {row["variant"]: row["peak_mb"] for row in found}
        for row in found:
            row |= described | {
                "ratio_to_sft": round(row["seconds"] / seconds["sft"], 3),
                "ratio_to_alpha0": round(row["seconds"] / seconds["alpha0"], 3),
                "peak_mb_below_sft": round(peaks["sft"] - row["peak_mb"]),
            }
            tell(row, options.json)
    if "forward" in options.part:
        found = in_turn(__file__, ["forward", "record"], passed, options.rounds)
        seconds = {row["variant"]: row["seconds"] for row in found}
        for row in found:
            ratio = seconds["forward"] / row["seconds"]
            tell(row | described | {"record_ratio_to_forward": round(ratio, 3)}, options.json)
    if "scale" in options.part:
        for number in (2000, 20000):
            (row,) = in_turn(__file__, ["scale"], {"rows": number}, 1)
            tell(row, options.json)
    if options.run is not None:
        found = list(quality(options.run, options.targets))
        for row in found:
            tell(row, options.json)
        if options.plot is not None:
            draw(found, options.plot)


if __name__ == "__main__":
    main()
