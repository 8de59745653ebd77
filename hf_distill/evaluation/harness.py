"""Benchmarks of lm-evaluation-harness (`lm_eval`), which the extra `eval` installs.

Tasks are those of the harness, or YAML files in a folder of the user's. The YAML file of a task
decides whether its rows are downloaded.
"""

from __future__ import annotations

import copy
import difflib
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hf_distill.errors import InputError
from hf_distill.models.base import base_model

# Number of bootstrap resamples for standard errors of metrics that are not means over rows.
RESAMPLES = 1000

Scores = dict[str, dict[str, dict[str, float]]]


def check_harness(tasks: Sequence[str], include_path: str | None) -> None:
    """InputError where the harness is missing, or has no such task, or cannot load its rows."""
    manager = _task_manager(tasks, include_path)
    known = manager.all_tasks
    for task in tasks:
        if task not in known:
            near = difflib.get_close_matches(task, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "give the folder of its YAML file"
            where = f" or in {include_path!r}" if include_path else ""
            raise InputError(f"task {task!r} is not in lm_eval{where}: {hint}")
    try:
        manager.load(list(tasks))
    except Exception as error:  # tasks load data and run code of their own
        raise _unusable(tasks, error) from error


def harness_scores(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    precision: torch.dtype | None = None,
) -> Scores:
    """Scores of a causal language model, without its chat template, in this process alone.

    tasks: names of tasks or groups; include_path: a folder with YAML files of further tasks
    limit: the first so many rows of each task; precision: of autocast
    returns: by task and metric `value`, and `stderr` (its standard error) where the harness has one
    raises: InputError where the harness is missing, or a task cannot be run
    """
    manager = _task_manager(tasks, include_path)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        found: Any = simple_evaluate(
            model=HFLM(
                base_model(model),
                tokenizer=copy.deepcopy(tokenizer),  # it may set a padding token
                batch_size=batch_size,
                mixed_precision_dtype=precision,
            ),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=RESAMPLES,
            log_samples=False,
        )
    except Exception as error:
        raise _unusable(tasks, error) from error
    return {task: _metrics(scores) for task, scores in found["results"].items()}


def _unusable(tasks: Sequence[str], error: Exception) -> InputError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return InputError(
        f"lm_eval cannot run {', '.join(tasks)} ({lines[0].rstrip('.')}): check the task's YAML "
        "file, and whether its rows are on this machine"
    )


def _metrics(scores: dict[str, Any]) -> dict[str, dict[str, float]]:
    """lm_eval's "acc,none" and "acc_stderr,none" as {"acc": {"value": ..., "stderr": ...}}."""
    metrics: dict[str, dict[str, float]] = {}
    for key, value in scores.items():
        name, comma, how = key.partition(",")
        if not comma or not isinstance(value, int | float) or isinstance(value, bool):
            continue  # its name, or a standard error that is not known
        metric = name.removesuffix("_stderr")
        shown = metric if how == "none" else f"{metric} ({how})"
        part = "stderr" if name.endswith("_stderr") else "value"
        metrics.setdefault(shown, {})[part] = float(value)
    return metrics


def _task_manager(tasks: Sequence[str], include_path: str | None) -> Any:
    """An index of the tasks in a folder, and of the harness's own tasks if these are needed.

    The harness has thousands of task files, which take long to read.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            "evaluate.harness needs lm-evaluation-harness: pip install 'hf-distill[eval]'"
        )
    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(
            f"evaluate.harness.include_path {include_path!r} is not a folder: give one with YAML "
            "files"
        )
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of everything that is unusual
    if include_path is not None:
        local = TaskManager(include_path=include_path, include_defaults=False)
        if set(tasks) <= set(local.all_tasks):
            return local
    return TaskManager(include_path=include_path)
