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
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    PreTrainedModel,
    Qwen2Config,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_distill import DistillationArguments, DistillationTrainer, record

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

VARIANTS = ["floor", "floor_sliced", "finetuning", "plain", "gkd", "ours"]
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SHAPES: dict[str, tuple[type, dict[str, Any]]] = {
    "gpt2": (GPT2Config, {"n_embd": 768, "n_layer": 12, "n_head": 12}),
    "gpt2-medium": (GPT2Config, {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "tiny": (GPT2Config, {"n_embd": 64, "n_layer": 2, "n_head": 2}),
    "small-vocabulary": (GPT2Config, {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 257}),
    "qwen2-0.5b": (
        Qwen2Config,
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2-1.5b": (
        Qwen2Config,
        {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
    ),
}


def model(
    name: str, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> PreTrainedModel:
    """A model with random weights, made on the device where it is used."""
    set_seed(seed)
    kind, shape = SHAPES[name]
    config = kind(**shape, **(NO_DROPOUT if kind is GPT2Config else {}))
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config).to(dtype)


def rows(options: argparse.Namespace) -> list[dict[str, list[int]]]:
    set_seed(0)
    kind, shape = SHAPES[options.student]
    vocabulary = shape.get("vocab_size", kind().vocab_size)
    ids = torch.randint(0, vocabulary, (options.batch * (options.repeats + 2), options.length))
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


def make_trainer(variant: str, options: argparse.Namespace, folder: str, **others: Any) -> Any:
    """A trainer that is ready for `repeats + 2` steps; others: replace its arguments."""
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
        **others,
    }
    data: dict[str, Any] = {"train_dataset": rows(options), "data_collator": collate}
    device = options.device
    student = model(options.student, 0, device=device)
    if variant == "finetuning":
        return Trainer(student, TrainingArguments(folder, **common), **data)
    teacher: Any = model(options.teacher, 1, torch.bfloat16 if narrow else torch.float32, device)
    if variant == "gkd":
        return gkd(student, teacher, folder, common, data)
    if variant == "recorded":
        dataset = Dataset.from_list(data["train_dataset"])
        place = f"{folder}/recording"
        data["train_dataset"] = record(dataset, teacher, place, data_collator=collate)
        teacher = None
    args = DistillationArguments(folder, fused_head=variant != "plain", **common)
    return DistillationTrainer(student, teacher, args, **data)


def gkd(student: Any, teacher: Any, folder: str, common: Any, data: Any) -> Any:
    """TRL's offline distillation: no generation, forward KL, no temperature."""
    try:
        from trl.experimental.gkd import GKDConfig, GKDTrainer
    except ImportError as error:
        raise Missing(str(error)) from error
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


def floor(options: argparse.Namespace, slices: int | None, clock: Clock) -> None:
    """The work that no distillation of this pair can do without."""
    narrow, device = options.dtype == "bfloat16", options.device
    dtype = torch.bfloat16 if narrow else torch.float32
    student = model(options.student, 0, device=device)
    teacher = model(options.teacher, 1, dtype, device)
    teacher.requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-5, fused=True)
    data = rows(options)
    for step in range(options.repeats + 2):
        batch = collate(data[step * options.batch : (step + 1) * options.batch])["input_ids"]
        batch = batch.to(device)
        clock.on_step_begin()
        with torch.autocast(device, torch.bfloat16, enabled=narrow):
            with torch.no_grad():
                theirs = teacher.base_model(batch, use_cache=False)[0].flatten(0, 1)
            hidden = student.base_model(batch, use_cache=False)[0]
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
        clock.on_step_end()


def worker(variant: str, options: argparse.Namespace) -> dict[str, Any]:
    gc.collect()
    forget_peak()
    before = memory_mb("VmRSS")
    loss, norm, clock = None, None, Clock()
    if variant in FLOORS:
        floor(options, FLOORS[variant], clock)
    else:
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(variant, options, folder)
            trainer.add_callback(clock)
            trainer.train()
        first = trainer.state.log_history[0]
        loss, norm = first["loss"], first["grad_norm"]
    return {
        "dtype": options.dtype,
        "temperature": 1.0,
        "seconds": statistics.median(clock.seconds[2:]),
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
    arguments.set_defaults(device="cpu")  # benchmarks/gpu_step.py makes models elsewhere
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
