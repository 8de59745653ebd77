"""Ways to cut a teacher to about the same number of parameters, before and after training.

    make real-models
    python benchmarks/pruning.py --train FILE --eval FILE
    python benchmarks/pruning.py ... --steps 120 --seeds 0,1,2 --json
    python benchmarks/pruning.py --teacher FOLDER [--gguf FILE] ...

The texts are plain, .gz or .xz files. The teacher is SmolLM2-135M by default. Each student is
distilled from the teacher (forward KL and cross-entropy, alpha 0.9, AdamW 2e-4), on the same packed
rows in the order of the seed. Perplexity is that of the held-out rows. Rows of the result: {method,
parameters, initial_perplexity, trained_perplexity, seed}; the teacher's own perplexity goes to
stderr.

The sizes are chosen for SmolLM2-135M (30 layers of 1,536 neurons and 9 heads in 3 groups): each
method removes 21 of its 134.5 million parameters. Others are given with --methods as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gzip
import json
import lzma
import sys
import tempfile
from pathlib import Path
from typing import Any

import real_models
import torch
from datasets import Dataset
from transformers import set_seed

from hf_distill import DistillationArguments, DistillationTrainer
from hf_distill.errors import silence_libraries
from hf_distill.models import load_model, load_tokenizer, student_and_report
from hf_distill.models.calibration import calibration_rows, run
from hf_distill.models.precision import bf16_is_fast

ON_CPU = not torch.accelerator.is_available()
BF16 = bf16_is_fast(cpu=ON_CPU)
DTYPE = torch.bfloat16 if BF16 else torch.float32
METHODS: dict[str, dict[str, Any]] = {
    "depth, evenly spaced": {"layers": "first_and_last", "num_layers": 24},
    "depth, by influence": {"layers": "influence", "num_layers": 24},
    "width, neurons": {"ffn": 1128},
    "width, neurons and heads": {"ffn": 1296, "heads": 6},
}
MEASURED, HELD_OUT = 16, 16  # rows


def tokens_of(path: str, tokenizer: Any, count: int) -> list[int]:
    """The first so many tokens of a text, lines joined as they are."""
    opened = {".gz": gzip.open, ".xz": lzma.open}.get(Path(path).suffix, open)
    found: list[int] = []
    with opened(path, "rt") as lines:
        for line in lines:
            found += tokenizer(line)["input_ids"]
            if len(found) >= count:
                return found[:count]
    raise SystemExit(f"{path} has {len(found):,} tokens, but {count:,} are needed: give more text")


def rows_of(path: str, tokenizer: Any, number: int, length: int) -> list[dict[str, list[int]]]:
    ids = tokens_of(path, tokenizer, number * length)
    return [{"input_ids": ids[i * length : (i + 1) * length]} for i in range(number)]


def perplexity(model: Any, rows: list[dict[str, list[int]]]) -> float | None:
    return run(model, calibration_rows(model, rows))


def distil(
    student: Any, teacher: Any, tokenizer: Any, rows: Dataset, seed: int, steps: int,
    alpha: float = 0.9, temperature: float = 1.0,
) -> Any:  # fmt: skip
    """Train for so many steps of two rows. teacher: None where the rows are a recording."""
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        args = DistillationArguments(
            folder, alpha=alpha, temperature=temperature, max_steps=steps, seed=seed,
            per_device_train_batch_size=2, learning_rate=2e-4, warmup_steps=max(1, steps // 10),
            bf16=BF16, use_cpu=ON_CPU, report_to="none", save_strategy="no", disable_tqdm=True,
            logging_steps=max(1, steps // 5), data_seed=seed,
        )  # fmt: skip
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the results
            trainer = DistillationTrainer(
                student.float(), teacher, args, train_dataset=rows, processing_class=tokenizer,
            )  # fmt: skip
            trainer.train()
    return trainer.model


def add_teacher(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", help="folder or id; by default that of `make real-models`")
    parser.add_argument("--gguf", help="GGUF file in it")


def teacher_and_tokenizer(options: argparse.Namespace) -> tuple[Any, Any]:
    folder, file = options.teacher, options.gguf
    if folder is None:
        folder = str(real_models.FOLDER / real_models.SMOLLM2.name)
        file = real_models.SMOLLM2_FILE
    which = {"gguf_file": file} if file else {}
    teacher = load_model(folder, "teacher", dtype=DTYPE, **which).eval()
    return teacher, load_tokenizer(folder, "teacher", **which)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_teacher(parser)
    parser.add_argument("--train", required=True, help="text to train and to measure units on")
    parser.add_argument("--eval", required=True, help="held-out text")
    parser.add_argument("--steps", type=int, default=40, help="of two rows each")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--seeds", default="0", help="separated by commas")
    parser.add_argument("--methods", type=json.loads, default=METHODS, help="as JSON")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    silence_libraries()
    teacher, tokenizer = teacher_and_tokenizer(options)
    needed = max(2 * options.steps, MEASURED)
    rows = rows_of(options.train, tokenizer, needed, options.length)
    data = Dataset.from_list(rows)
    held_out = rows_of(options.eval, tokenizer, HELD_OUT, options.length)
    print(f"teacher: perplexity {perplexity(teacher, held_out):.1f}", file=sys.stderr)
    for method, cut in options.methods.items():
        student, report = student_and_report(teacher, **cut, rows=rows[:MEASURED])
        initial = perplexity(student, held_out)
        for seed in map(int, options.seeds.split(",")):
            trained = distil(copy.deepcopy(student), teacher, tokenizer, data, seed, options.steps)
            result = {"method": method, "parameters": report.parameters, "seed": seed}
            result |= {
                "initial_perplexity": initial,
                "trained_perplexity": perplexity(trained, held_out),
            }
            if options.json:
                print(json.dumps(result), flush=True)
            else:
                print(*(f"{key} {value}" for key, value in result.items()), sep="  ", flush=True)


if __name__ == "__main__":
    main()
