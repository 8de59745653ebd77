"""An on-policy step: the student writes, the teacher judges, the student learns.

    python benchmarks/on_policy.py                          gpt2-medium teaching gpt2, float32
    python benchmarks/on_policy.py --teacher tiny --student tiny --new-tokens 16     in seconds

Random weights, prompts of random ids, reverse KL over the whole vocabulary. `generate` is a bare
call of transformers for the same prompts in one batch. `off_policy` trains on rows of the same
lengths as data; its seconds are those of judging and learning alone. The peers are TRL's
`DistillationTrainer` (`trl`) and `GKDTrainer` with lmbda=1 (`gkd`): pip install
'hf-distill[bench]'. Of these only writing is timed apart; `learning_s` is the rest of their step.
Optimizer steps are left out everywhere.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
from typing import Any

import torch
from common import Missing, answer, forget_peak, in_turn, memory_mb, parser
from datasets import Dataset
from step import SHAPES, model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, TrainerCallback

from hf_distill import DistillationArguments, DistillationTrainer

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

VARIANTS = ["generate", "off_policy", "ours", "trl", "gkd"]
WARM_UP = 1  # steps that are not counted


def vocabulary(name: str) -> int:
    kind, shape = SHAPES[name]
    return shape.get("vocab_size", kind().vocab_size)


def prompts(options: argparse.Namespace) -> list[list[int]]:
    draw = random.Random(0)
    ids, number = vocabulary(options.student), options.batch * (options.repeats + WARM_UP)
    return [[draw.randrange(1, ids) for _ in range(options.prompt)] for _ in range(number)]


def tokenizer(options: argparse.Namespace) -> PreTrainedTokenizerFast:
    """Words that spell the ids, for peers that take text."""
    words = {"<eos>": 0} | {f"w{i}": i for i in range(1, vocabulary(options.student))}
    made = Tokenizer(WordLevel(words, unk_token="<eos>"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<eos>")


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}
    return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


def collate_for_gkd(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    batch = collate(rows)
    prompt = int((batch["labels"][0] == -100).sum())
    more = {"prompts": "input_ids", "prompt_attention_mask": "attention_mask"}
    return batch | {name: batch[of][:, :prompt] for name, of in more.items()}


class Clock(TrainerCallback):
    """Seconds of each step up to its optimizer, and of `generate` within it."""

    def __init__(self, student: Any) -> None:
        self.steps: list[float] = []
        self.writing: list[float] = []
        generate, self._wrote = student.generate, 0.0

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return generate(*args, **kwargs)
            finally:
                self._wrote += time.perf_counter() - start

        student.generate = timed
        self._start = time.perf_counter()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.steps.append(time.perf_counter() - self._start)
        self.writing.append(self._wrote)
        self._wrote = 0.0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    on_log = on_step_end  # a log comes after its step


def make_trainer(variant: str, options: argparse.Namespace, folder: str) -> Any:
    student, teacher = model(options.student, 0), model(options.teacher, 1)
    common: dict[str, Any] = {
        "max_steps": options.repeats + WARM_UP,
        "per_device_train_batch_size": options.batch,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    given = prompts(options)
    rows = [{"input_ids": row, "labels": [-100] * len(row)} for row in given]
    if variant in ("off_policy", "gkd"):  # the latter counts the targets of its data
        draw, ids = random.Random(1), vocabulary(options.student)
        for row in rows:
            completion = [draw.randrange(1, ids) for _ in range(options.new_tokens)]
            row["input_ids"], row["labels"] = (
                row["input_ids"] + completion,
                row["labels"] + completion,
            )
    if variant in ("trl", "gkd"):
        make = trl if variant == "trl" else gkd
        return make(student, teacher, folder, common, given, rows, options)
    del common["gradient_checkpointing"]
    args = DistillationArguments(
        folder, alpha=1.0, divergence="reverse_kl", on_policy=float(variant == "ours"),
        max_new_tokens=options.new_tokens, train_sampling_strategy="sequential",
        dataloader_pin_memory=False, **common,
    )  # fmt: skip
    return DistillationTrainer(student, teacher, args, train_dataset=rows, data_collator=collate)


def trl(
    student: Any, teacher: Any, folder: str, common: Any, given: Any, rows: Any, options: Any
) -> Any:
    try:
        from trl import DistillationConfig
        from trl import DistillationTrainer as Peer
    except ImportError as error:
        raise Missing(str(error)) from error
    texts = [" ".join(f"w{i}" for i in row) for row in given]
    args = DistillationConfig(
        folder, max_completion_length=options.new_tokens, beta=1.0, shuffle_dataset=False,
        top_k=0, **common,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": texts})
    return Peer(student, teacher, args, train_dataset=data, processing_class=tokenizer(options))


def gkd(
    student: Any, teacher: Any, folder: str, common: Any, given: Any, rows: Any, options: Any
) -> Any:
    try:
        from trl.experimental.gkd import GKDConfig, GKDTrainer
    except ImportError as error:
        raise Missing(str(error)) from error
    args = GKDConfig(
        folder, lmbda=1.0, beta=1.0, temperature=1.0, max_new_tokens=options.new_tokens, **common
    )
    return GKDTrainer(
        student, teacher, args, train_dataset=Dataset.from_list(rows),
        data_collator=collate_for_gkd, processing_class=tokenizer(options),
    )  # fmt: skip


def bare_generate(options: argparse.Namespace) -> list[float]:
    student, found = model(options.student, 0).eval(), []
    given = prompts(options)
    for step in range(options.repeats + WARM_UP):
        ids = torch.tensor(given[step * options.batch : (step + 1) * options.batch])
        start = time.perf_counter()
        student.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0,
            max_new_tokens=options.new_tokens, pad_token_id=0,
        )  # fmt: skip
        found.append(time.perf_counter() - start)
    return found


def worker(variant: str, options: argparse.Namespace) -> dict[str, Any]:
    gc.collect()
    forget_peak()
    names = {"model": options.student, "teacher": options.teacher}
    names |= {"prompt": options.prompt, "new_tokens": options.new_tokens, "batch": options.batch}
    if variant == "generate":
        writing = statistics.median(bare_generate(options)[WARM_UP:])
        found: dict[str, Any] = {"writing_s": writing, "seconds": writing}
    else:
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(variant, options, folder)
            clock = Clock(trainer.model)
            trainer.add_callback(clock)
            trainer.train()
        steps, writing = (statistics.median(s[WARM_UP:]) for s in (clock.steps, clock.writing))
        found = {"seconds": steps, "writing_s": writing, "learning_s": steps - writing}
        logs = [entry for entry in trainer.state.log_history if "judging_seconds" in entry]
        if logs:
            # `generate` alone; what is around it is a part of writing, too.
            for name in ("writing", "judging", "learning"):
                values = [entry[f"{name}_seconds"] for entry in logs[WARM_UP:]]
                found[f"{name}_s"] = statistics.median(values)
            found["written_tokens"] = logs[-1]["written_tokens"]
    return names | found | {"peak_mb": memory_mb("VmHWM")}


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--variants", default=",".join(VARIANTS))
    arguments.add_argument("--teacher", default="gpt2-medium", choices=SHAPES)
    arguments.add_argument("--student", default="gpt2", choices=SHAPES)
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--prompt", type=int, default=64)
    arguments.add_argument("--new-tokens", type=int, default=128)
    arguments.add_argument("--repeats", type=int, default=3)
    options = arguments.parse_args()
    if options.worker:
        answer(lambda: worker(options.worker, options))
        return
    names = ("teacher", "student", "batch", "prompt", "new_tokens", "repeats")
    passed = {name: getattr(options, name) for name in names}
    found = in_turn(__file__, options.variants.split(","), passed, options.rounds)
    by_name = {row["variant"]: row for row in found if "missing" not in row}
    for row in found:
        if "trl" in by_name and "seconds" in row:
            row["ratio_to_trl"] = round(row["seconds"] / by_name["trl"]["seconds"], 3)
    show(found, as_json=options.json)


def show(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    for row in rows:
        if as_json:
            print(json.dumps(row), flush=True)
        elif "missing" in row:
            print(f"{row['variant']:<12} missing: {row['missing']}")
        else:
            times = [f"{name} {row[f'{name}_s']:.3f}" for name in ("writing", "judging", "learning")
                     if f"{name}_s" in row]  # fmt: skip
            ratio = f"  {row['ratio_to_trl']:.2f} x trl" if "ratio_to_trl" in row else ""
            print(
                f"{row['variant']:<12} {row['seconds']:8.3f} s  {', '.join(times)}  "
                f"{row['peak_mb']:7.0f} MB{ratio}",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main())
