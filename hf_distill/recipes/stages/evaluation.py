"""Stages `evaluate` and `report`: metrics, the report and the student's card."""

from __future__ import annotations

import gc
import json
import platform
from collections.abc import Iterable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset

from hf_distill.evaluation import Evaluation, evaluate_models
from hf_distill.evaluation.harness import Scores, harness_scores
from hf_distill.evaluation.performance import MB, PeakMemory, size_mb
from hf_distill.losses.divergences import parameters
from hf_distill.models.engines import made_whole
from hf_distill.recipes import Recipe
from hf_distill.recipes.stages.continuing import Continuations, written_by
from hf_distill.recipes.stages.models import (
    accelerator_of,
    collator_of,
    rows_of,
    student_initial,
    teacher_source,
    teacher_tokenizer_of,
    tokenizer_of,
    trained,
    unadapted_teacher,
)
from hf_distill.recipes.stages.stage import Run, read_json
from hf_distill.recipes.stages.task_evaluation import examples_of, generation_of, references_of
from hf_distill.reporting.comparison import (
    benchmark_table,
    by_task,
    compare,
    nearer_sentence,
    results_table,
)
from hf_distill.reporting.formatting import ROLES
from hf_distill.reporting.model_card import CardFacts, write_card
from hf_distill.reporting.report import write_report
from hf_distill.reporting.words import names, unequal
from hf_distill.teachers import LiveTeacher, as_teacher
from hf_distill.training.feature_settings import features_named
from hf_distill.training.on_policy.arguments import given_settings

Figures = dict[str, dict[str, float]]

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
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
    section, tokenizer = run.recipe.evaluate, tokenizer_of(run)
    sets = {split: rows_of(run, split) for split in run.recipe.data.eval_splits}
    causal = run.recipe.task == "causal-lm"
    shown = Continuations(run, sets) if causal else None
    accelerator = accelerator_of(run)
    figures: dict[str, dict[str, Evaluation]] = {split: {} for split in sets}
    all_costs: Figures = {}
    scores: dict[str, Scores] = {}
    for roles in _together(run):
        run.log(f"  {', '.join(roles)}")
        models = {role: _model(run, role, teacher) for role in roles}
        quality, costs = evaluate_models(
            models,
            teacher,
            sets,
            tokenizer,
            references=references_of(run),
            generate=generation_of(run),
            batch_size=section.batch_size,
            data_collator=collator_of(run.recipe, tokenizer),
            accelerator=accelerator,
            speed=section.speed,
        )
        for split, found in quality.items():
            figures[split] |= found
        for role in roles:
            all_costs[role] = costs[role] | _training_time(run, role)
        if shown is not None:
            scores |= _generate(run, models, teacher, sets, accelerator, shown, figures)
        del models
        gc.collect()
        run.state.wait_for_everyone()
    AcceleratorState._reset_state()  # a later training may have another precision
    if run.state.is_main_process:
        if shown is not None:
            facts: dict[str, Any] = {"continuations": shown.table}
        else:
            measured = figures[next(iter(sets))]
            ordered = {role: measured[role] for role in ROLES if role in measured}
            facts = {"task": run.recipe.task, "examples": examples_of(run, ordered)}
        if scores:
            facts["harness"] = {"version": version("lm_eval"), "tasks": by_task(scores)}
        _write(run, result, figures, all_costs, facts)


def _generate(
    run: Run,
    models: Mapping[str, Any],
    teacher: LiveTeacher,
    sets: Mapping[str, Dataset],
    accelerator: Accelerator,
    shown: Continuations,
    figures: Mapping[str, dict[str, Evaluation]],
) -> dict[str, Scores]:
    """Let causal models continue prompts, into `shown` and `figures`; their benchmark scores.

    A collective of all processes. A teacher in shards runs on all of them, and only continues.
    """
    scores: dict[str, Scores] = {}
    for role, model in models.items():
        if role in ("unadapted", "initial"):
            continue
        in_shards = role == "teacher" and teacher.together
        if run.state.is_main_process or in_shards:
            shown.add(role, model)
        if in_shards:
            continue
        for split, rows in sets.items() if run.recipe.evaluate.written else ():
            figures[split][role] |= written_by(run, model, teacher, rows, accelerator)
        if run.recipe.evaluate.harness is not None:
            precision = PRECISIONS.get(accelerator.mixed_precision)
            scores[role] = run.from_main(partial(_benchmarks, run, model, precision))
    return scores


def _benchmarks(run: Run, model: Any, precision: torch.dtype | None) -> Scores:
    section = run.recipe.evaluate
    assert section.harness is not None
    return harness_scores(
        model,
        tokenizer_of(run),
        section.harness.tasks,
        include_path=section.harness.include_path,
        limit=section.harness.limit,
        batch_size=section.batch_size,
        precision=precision,
    )


def _training_time(run: Run, role: str) -> dict[str, float]:
    adapted = role == "teacher" and run.recipe.teacher.adapt is not None
    if role not in ("baseline", "off_policy", "student") and not adapted:
        return {}
    training = read_json(run.folder / role / "training_results.json")
    return {"train_seconds": training["train_seconds"]}


def _write(
    run: Run,
    result: Path,
    sets: Mapping[str, Mapping[str, Any]],
    costs: Figures,
    shown: dict[str, Any],
) -> None:
    """Write `metrics.json`. The figures of the first set are the main ones, beside the costs.

    sets: the quality of each role by split; costs: of each role, the same for all sets
    """
    main = next(iter(sets))
    sets = {
        split: {role: found[role] for role in ROLES if role in found}
        for split, found in sets.items()
    }
    comparisons = {split: compare(figures) for split, figures in sets.items()}
    figures = {role: found | costs[role] for role, found in sets[main].items()}
    facts = {"comparison": comparisons[main], **shown, **_circumstances(run)}
    if main == "eval":
        run.show(results_table(figures, comparisons[main]))
    else:
        named = {split.removeprefix("eval/"): split for split in sets}
        for name, split in named.items():
            run.log(f"  {name}")
            table = figures if split == main else sets[split]
            run.show(results_table(table, comparisons[split]))
        facts["sets"] = {
            name: {**sets[split], "comparison": comparisons[split]} for name, split in named.items()
        }
        if sentence := nearer_sentence(facts["sets"]):
            run.log(f"  {sentence}")
    if "harness" in facts:
        run.show(benchmark_table(facts))
    result.write_text(json.dumps({**figures, **facts}, indent=2), encoding="utf-8")


def write_report_and_card(run: Run, result: Path) -> None:
    """`report.html`, and the student's `README.md`."""
    metrics = json.loads((run.folder / "metrics.json").read_text(encoding="utf-8"))
    write_card(run.folder / "student", _facts(run, metrics))
    write_report(run.folder).rename(result)
    run.log(f"  {run.folder / 'report.html'}")


def _roles(run: Run) -> list[str]:
    """The teacher first, since its own figures are those of the forward that the others share."""
    unwanted = {"unadapted"} if run.recipe.teacher.adapt is None else set()
    unwanted |= set() if run.recipe.baseline else {"baseline"}
    unwanted |= set() if run.recipe.off_policy is not None else {"off_policy"}
    roles = ("teacher", "unadapted", "initial", "baseline", "off_policy", "student")
    return [role for role in roles if role not in unwanted]


def _together(run: Run) -> list[list[str]]:
    """The roles that are measured together: all of them, where they fit into half of the memory.

    Otherwise one at a time, which runs the teacher again for each.
    """
    roles = _roles(run)

    def fits() -> bool:
        here = 1 if torch.cuda.is_available() else run.state.num_processes
        of = dict.fromkeys(roles, "student_initial") | {"unadapted": "teacher"}
        size = sum(size_mb(run.folder / of[role]) * MB for role in roles if role != "teacher")
        return here * size < PeakMemory.available() / 2

    return [roles] if run.from_main(fits) else [[role] for role in roles]


def _model(run: Run, role: str, teacher: LiveTeacher) -> Any:
    if role == "teacher":
        return teacher.model
    if role == "initial":
        with made_whole():
            return student_initial(run)
    if role == "unadapted":
        return unadapted_teacher(run)
    return trained(run, role)


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
        dataset=_named(recipe.data.train_places.values()),
        evaluated_on={
            split.removeprefix("eval").removeprefix("/"): _named([places])
            for split, places in recipe.data.eval_places.items()
        },
        objective=_objective(told["train"]),
        metrics=metrics,
        training={"seed": recipe.seed} | _training(recipe, told["train"]),
        versions=metrics["versions"],
        repo_id=recipe.publish.repo_id,
        adapter=lora,
        task=recipe.task,
        examples=metrics.get("examples") or (),
        unequal=unequal(told),
    )


def _new(recipe: Recipe) -> str | None:
    config = recipe.student.config
    return f"a {config['model_type']} with random weights" if config else None


def _named(sets: Iterable[list[str]]) -> list[str]:
    """Readable names of the training data."""
    listed = [place for places in sets for place in places]
    return ["Python's standard library" if "{stdlib}" in place else place for place in listed]


def _objective(train: dict[str, Any]) -> dict[str, Any]:
    names = ("alpha", "temperature", "divergence", *parameters(train["divergence"]))
    found = {name: train[name] for name in names}
    return found | {"features": features_named(train.get("features"))} | given_settings(train)


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
