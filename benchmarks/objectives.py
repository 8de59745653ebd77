"""What a student learns from: labels, a live teacher or its recordings, at some alpha and T.

    make real-models
    python benchmarks/objectives.py --train FILE --eval novels=FILE --eval wikitext=FILE
    python benchmarks/objectives.py ... --seeds 0,1,2 --only "top-k 64" "50 draws" --json
    python benchmarks/objectives.py --teacher FOLDER [--gguf FILE] ...

The texts are plain, .gz or .xz files. The teacher is SmolLM2-135M by default, and the student 24 of
its layers, those of the most influence. All students start from the same weights, and the seed
decides the order of the rows. Rows of the result: {variant, seed, set, perplexity, kl, agreement};
those of the teacher and of the untrained student come first.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import sys
import tempfile
from typing import Any

from datasets import Dataset
from pruning import MEASURED, add_teacher, distil, rows_of, teacher_and_tokenizer

from hf_distill import evaluate_student, record
from hf_distill.errors import silence_libraries
from hf_distill.models import student_and_report

# The recording, if the rows are one, and the weights of the objective.
VARIANTS: dict[str, dict[str, Any]] = {
    "labels": {"alpha": 0.0},
    "alpha 0.5": {"alpha": 0.5},
    "alpha 0.9": {"alpha": 0.9},
    "alpha 1": {"alpha": 1.0},
    "alpha 0.9, T 2": {"alpha": 0.9, "temperature": 2.0},
    "top-k 64": {"recording": {"kind": "top_k", "k": 64}},
    "50 draws": {"recording": {"kind": "sampled", "draws": 50}},
}


def figures(model: Any, teacher: Any, tokenizer: Any, sets: dict[str, Dataset]) -> dict[str, Any]:
    """Perplexity, KL to the teacher and agreement on each held-out set."""
    found = {}
    for name, rows in sets.items():
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the results
            all_figures = evaluate_student(
                model, teacher, rows, tokenizer, batch_size=2, speed=False
            )
        known = {"perplexity": "perplexity", "kl": "kl_to_teacher", "agreement": "top1_agreement"}
        found[name] = {short: all_figures[long] for short, long in known.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_teacher(parser)
    parser.add_argument("--train", required=True, help="text to train on")
    parser.add_argument("--eval", required=True, action="append", help="NAME=FILE, held-out text")
    parser.add_argument("--held-out", type=int, default=16, help="rows of each held-out text")
    parser.add_argument("--steps", type=int, default=40, help="of two rows each")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--seeds", default="0", help="separated by commas")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    silence_libraries()
    teacher, tokenizer = teacher_and_tokenizer(options)
    needed = max(2 * options.steps, MEASURED)
    rows = rows_of(options.train, tokenizer, needed, options.length)
    sets = {
        name: Dataset.from_list(rows_of(file, tokenizer, options.held_out, options.length))
        for name, file in (text.split("=", 1) for text in options.eval)
    }
    initial, _ = student_and_report(teacher, "influence", num_layers=24, rows=rows[:MEASURED])

    def show(variant: str, seed: int | None, model: Any) -> None:
        for name, found in figures(model, teacher, tokenizer, sets).items():
            row = {"variant": variant, "seed": seed, "set": name} | found
            said = "  ".join(f"{key} {value}" for key, value in row.items())
            print(json.dumps(row) if options.json else said, flush=True)

    show("teacher", None, teacher)
    show("untrained", None, initial)
    with tempfile.TemporaryDirectory() as folder:
        for variant in options.only:
            weights = dict(VARIANTS[variant])
            data, live = Dataset.from_list(rows), teacher
            if recording := weights.pop("recording", None):
                with contextlib.redirect_stdout(sys.stderr):
                    data = record(
                        data, teacher, f"{folder}/{variant}", tokenizer=tokenizer, **recording
                    )
                live = None
            for seed in map(int, options.seeds.split(",")):
                student = copy.deepcopy(initial)
                distil(student, live, tokenizer, data, seed, options.steps, **weights)
                show(variant, seed, student)


if __name__ == "__main__":
    main()
