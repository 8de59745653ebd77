"""Stages `evaluate` and `report`: metrics, the report and the student's card."""

from __future__ import annotations

import gc
import json
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset

from hf_distill.data import collator
from hf_distill.evaluation.evaluate import continuations, evaluate_student
from hf_distill.losses.divergences import parameters
from hf_distill.losses.targets import IGNORE
from hf_distill.models.engines import made_whole, plain_accelerator
from hf_distill.models.vocabulary import head_rows, shared_vocabulary
from hf_distill.recipes import Recipe
from hf_distill.recipes.stages.models import (
    rows_of,
    student_initial,
    teacher_source,
    teacher_tokenizer_of,
    tokenizer_of,
    trained,
)
from hf_distill.recipes.stages.stage import Run, read_json
from hf_distill.recipes.stages.task_evaluation import TaskMeasure
from hf_distill.reporting.comparison import compare, results_table
from hf_distill.reporting.model_card import CardFacts, write_card
from hf_distill.reporting.report import names, write_report
from hf_distill.teachers import LiveTeacher, as_teacher

PACKAGES = ("hf-distill", "torch", "transformers", "accelerate", "datasets", "peft", "evaluate")


def measure(run: Run, result: Path) -> None:
    """`metrics.json`: every model of the run beside the teacher, on the held-out rows."""
    name, kwargs = teacher_source(run)
    teacher = as_teacher(
        name,
        teacher_tokenizer_of(run),
        task=run.recipe.task,
        placement=run.recipe.teacher.placement,
        **kwargs,
    )
    assert isinstance(teacher, LiveTeacher)  # there is a name
    if run.recipe.task != "causal-lm":
        _measure_task(run, teacher, result)
        return
    section, tokenizer, rows = run.recipe.evaluate, tokenizer_of(run), rows_of(run, "eval")
    most = min(
        section.prompt_tokens, run.recipe.data.max_length // 2
    )  # leaves positions for the continuation
    prompts = [_prompt(rows[i], most) for i in _spread(rows, section.prompts)]
    accelerator = plain_accelerator()
    figures: dict[str, dict[str, float]] = {}
    shown: list[dict[str, str]] = [{} for _ in prompts]
    for role, model in _models(run, teacher):
        run.log(f"  {role}")
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        figures[role] = evaluate_student(
            model,
            teacher,
            rows,
            tokenizer,
            batch_size=section.batch_size,
            data_collator=collator(tokenizer),
            shared_vocabulary=shared_vocabulary(
                head_rows(base), teacher.rows, tokenizer, teacher.tokenizer
            ),
            accelerator=accelerator,
            speed=section.speed,
        )
        figures[role] |= _training_time(run, role)
        shards = role == "teacher" and teacher.together  # run by all processes together
        if role != "initial" and (run.state.is_main_process or shards):
            texts = continuations(
                {role: model}, prompts, tokenizer, max_new_tokens=section.max_new_tokens
            )
            shown = [{**before, **text} for before, text in zip(shown, texts, strict=True)]
        run.state.wait_for_everyone()
    if run.state.is_main_process:
        _write(run, result, figures, {"continuations": shown})


def _measure_task(run: Run, teacher: LiveTeacher, result: Path) -> None:
    """The same for other tasks than causal language modelling."""
    measure = TaskMeasure(run, teacher, plain_accelerator())
    figures: dict[str, dict[str, float]] = {}
    for role, model in _models(run, teacher):
        run.log(f"  {role}")
        figures[role] = measure(role, model) | _training_time(run, role)
    if run.state.is_main_process:
        examples = measure.examples(run.recipe.evaluate.prompts)
        _write(run, result, figures, {"task": run.recipe.task, "examples": examples})


def _training_time(run: Run, role: str) -> dict[str, float]:
    if role not in ("baseline", "off_policy", "student"):
        return {}
    training = read_json(run.folder / role / "training_results.json")
    return {"train_seconds": training["train_seconds"]}


def _write(
    run: Run, result: Path, figures: dict[str, dict[str, float]], shown: dict[str, Any]
) -> None:
    comparison = compare(figures)
    run.show(results_table(figures, comparison))
    facts = {"comparison": comparison, **shown, **_circumstances(run)}
    result.write_text(json.dumps({**figures, **facts}, indent=2), encoding="utf-8")


def write_report_and_card(run: Run, result: Path) -> None:
    """`report.html`, and the student's `README.md`."""
    metrics = json.loads((run.folder / "metrics.json").read_text(encoding="utf-8"))
    write_card(run.folder / "student", _facts(run, metrics))
    write_report(run.folder).rename(result)
    run.log(f"  {run.folder / 'report.html'}")


def _models(run: Run, teacher: LiveTeacher) -> Iterator[tuple[str, Any]]:
    """Each model of the run, one at a time beside the teacher, so that memory holds two."""
    yield "teacher", teacher.model
    with made_whole():
        initial = student_initial(run)
    yield "initial", initial
    del initial
    wanted = {"baseline": run.recipe.baseline, "off_policy": run.recipe.off_policy is not None}
    for role in (*(name for name, there in wanted.items() if there), "student"):
        gc.collect()
        yield role, trained(run, role)


def _prompt(row: dict[str, Any], most: int) -> list[int]:
    """The row up to its first target; of plain text the beginning."""
    ids, labels = row["input_ids"], row["labels"]
    learnt = next((i for i, label in enumerate(labels) if label != IGNORE), 0)
    return ids[:learnt] if learnt > 1 else ids[:most]


def _spread(rows: Dataset, number: int) -> list[int]:
    """Indices of a few rows, evenly over the set."""
    number = min(number, len(rows))
    return [i * len(rows) // number for i in range(number)]


def _circumstances(run: Run) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    machine = {
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "accelerator": torch.cuda.get_device_name() if cuda else "none",
        "processes": run.state.num_processes,
    }
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    return {"machine": machine, "versions": versions, "seed": run.recipe.seed}


def _processor() -> str:
    """The processor's name, if the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _facts(run: Run, metrics: dict[str, Any]) -> CardFacts:
    recipe = run.recipe
    told = recipe.resolved()
    teacher, student = names(told)
    lora = recipe.student.lora is not None and not recipe.student.lora.merge
    return CardFacts(
        model_name=recipe.name,
        teacher=recipe.teacher.model or teacher,
        initial_from=recipe.student.model or _new(recipe) or student,
        dataset=_named(recipe.data.train),
        objective=_objective(told["train"]),
        metrics=metrics,
        training={"seed": recipe.seed} | _training(recipe, told["train"]),
        versions=metrics["versions"],
        repo_id=recipe.publish.repo_id,
        adapter=lora,
        task=recipe.task,
        examples=metrics.get("examples") or (),
    )


def _new(recipe: Recipe) -> str | None:
    config = recipe.student.config
    return f"a {config['model_type']} with random weights" if config else None


def _named(places: str | list[str]) -> list[str]:
    """Readable names of the training data."""
    listed = [places] if isinstance(places, str) else places
    return ["Python's standard library" if "{stdlib}" in place else place for place in listed]


def _objective(train: dict[str, Any]) -> dict[str, Any]:
    names = ("alpha", "temperature", "divergence", *parameters(train["divergence"]))
    return {name: train[name] for name in names}


def _training(recipe: Recipe, train: dict[str, Any]) -> dict[str, Any]:
    """The training settings that the recipe itself gives."""
    told = (
        "max_steps",
        "num_train_epochs",
        "learning_rate",
        "lr_scheduler_type",
        "global_batch_size",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
    )
    found = {name: train[name] for name in told if name in train}
    return {**found, "tokens per row at most": recipe.data.max_length}
