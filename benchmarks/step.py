"""A whole optimizer step, gpt2-medium teaching gpt2 on 2 rows of 512 tokens.

    python benchmarks/step.py                          float32
    python benchmarks/step.py --dtype float32,bfloat16
    python benchmarks/step.py --teacher tiny --student tiny      in seconds, to see that it works

Random weights (speed does not depend on them), real trainers. `floor` is the teacher's forward,
the student's forward and backward, both without heads, AdamW, and the four products of the heads as
plain calls; `floor_sliced` makes the logits for 512 ids at a time, as ours does in float32.
`finetuning` is a plain Trainer without a teacher. bfloat16 is `bf16=True` with a bfloat16 teacher.
Peers: pip install 'hf-distill[bench]'.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from typing import Any

import torch
from common import (
    FLOORS,
    Missing,
    answer,
    forget_peak,
    four_products,
    in_turn,
    memory_mb,
    parser,
    show,
)
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_distill import DistillationArguments, DistillationTrainer

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

VARIANTS = ["floor", "floor_sliced", "finetuning", "plain", "gkd", "ours"]
SHAPES = {
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "tiny": {"n_embd": 64, "n_layer": 2, "n_head": 2},
}


def model(name: str, seed: int, dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    set_seed(seed)
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**SHAPES[name], **none)).to(dtype)


def rows(options: argparse.Namespace) -> list[dict[str, list[int]]]:
    set_seed(0)
    ids = torch.randint(0, 50257, (options.batch * (options.repeats + 2), options.length))
    return [{"input_ids": row, "labels": row} for row in ids.tolist()]


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


class Clock(TrainerCallback):
    """Seconds and gradient norm of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def make_trainer(variant: str, options: argparse.Namespace, folder: str) -> Any:
    narrow = options.dtype == "bfloat16"
    common: dict[str, Any] = {
        "max_steps": options.repeats + 2,
        "per_device_train_batch_size": options.batch,
        "logging_steps": 1,
        "bf16": narrow,
        "use_cpu": not torch.accelerator.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
    }
    data = {"train_dataset": rows(options), "data_collator": collate}
    student = model(options.student, 0)
    if variant == "finetuning":
        return Trainer(student, TrainingArguments(folder, **common), **data)
    teacher = model(options.teacher, 1, torch.bfloat16 if narrow else torch.float32)
    if variant == "gkd":
        return gkd(student, teacher, folder, common, data)
    args = DistillationArguments(folder, fused_head=variant == "ours", **common)
    return DistillationTrainer(student, teacher, args, **data)


def gkd(student: Any, teacher: Any, folder: str, common: Any, data: Any) -> Any:
    """TRL's offline distillation: no generation, forward KL, no temperature."""
    try:
        from trl.experimental.gkd import GKDConfig, GKDTrainer
    except ImportError as error:
        raise Missing(str(error)) from error
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<eos>": 0}, unk_token="<eos>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", pad_token="<eos>"
    )
    options = {"lmbda": 0.0, "beta": 0.0, "temperature": 1.0, "gradient_checkpointing": False}
    common = {k: v for k, v in common.items() if k != "train_sampling_strategy"}
    return GKDTrainer(
        student,
        teacher,
        GKDConfig(folder, **options, **common),
        data_collator=data["data_collator"],
        train_dataset=Dataset.from_list(data["train_dataset"]),
        processing_class=tokenizer,
    )


def floor(options: argparse.Namespace, slices: int | None) -> list[float]:
    """The work that no distillation of this pair can do without."""
    narrow = options.dtype == "bfloat16"
    dtype = torch.bfloat16 if narrow else torch.float32
    student, teacher = model(options.student, 0), model(options.teacher, 1, dtype)
    teacher.requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-5, fused=True)
    data, seconds = rows(options), []
    for step in range(options.repeats + 2):
        batch = collate(data[step * options.batch : (step + 1) * options.batch])["input_ids"]
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            with torch.no_grad():
                theirs = teacher.transformer(batch, use_cache=False)[0].flatten(0, 1)
            hidden = student.transformer(batch, use_cache=False)[0]
        slope, of_head = four_products(
            hidden.detach().flatten(0, 1).to(dtype),
            student.lm_head.weight.detach().to(dtype),
            theirs.to(dtype),
            teacher.lm_head.weight,
            slices,
        )
        hidden.backward(slope.view_as(hidden).to(hidden.dtype))
        student.lm_head.weight.grad.add_(of_head)
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return seconds


def worker(variant: str, options: argparse.Namespace) -> dict[str, Any]:
    gc.collect()
    forget_peak()
    before = memory_mb("VmRSS")
    loss = norm = None
    if variant in FLOORS:
        seconds = floor(options, FLOORS[variant])
    else:
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(variant, options, folder)
            clock = Clock()
            trainer.add_callback(clock)
            trainer.train()
        first = trainer.state.log_history[0]
        seconds, loss, norm = clock.seconds, first["loss"], first["grad_norm"]
    return {
        "dtype": options.dtype,
        "temperature": 1.0,
        "seconds": statistics.median(seconds[2:]),
        "peak_mb": memory_mb("VmHWM"),
        "extra_mb": memory_mb("VmHWM") - before,
        "loss": loss,
        "grad_norm": norm,
    }


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--variants", default=",".join(VARIANTS))
    arguments.add_argument("--dtype", default="float32")
    arguments.add_argument("--teacher", default="gpt2-medium", choices=SHAPES)
    arguments.add_argument("--student", default="gpt2", choices=SHAPES)
    arguments.add_argument("--batch", type=int, default=2)
    arguments.add_argument("--length", type=int, default=512)
    arguments.add_argument("--repeats", type=int, default=4)
    options = arguments.parse_args()
    if options.worker:
        answer(lambda: worker(options.worker, options))
        return
    passed = {k: getattr(options, k) for k in ("teacher", "student", "batch", "length", "repeats")}
    for dtype in options.dtype.split(","):
        variants = options.variants.split(",")
        found = in_turn(__file__, variants, passed | {"dtype": dtype}, options.rounds)
        by_name = {row["variant"]: row for row in found}
        if {"ours", "plain"} <= by_name.keys():
            for key in ("loss", "grad_norm"):
                ours, plain = by_name["ours"][key], by_name["plain"][key]
                if not abs(ours - plain) <= 0.01 * abs(plain):
                    raise SystemExit(f"ours and plain disagree in {key}: {ours} against {plain}")
        show(found, options.json)


if __name__ == "__main__":
    main()
