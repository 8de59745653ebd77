"""The ten stages, with the inputs of each and the results that it uses.

prepare -> teacher -> annotate -> record -> student -> baseline -> off_policy -> train -> evaluate
-> report
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

from hf_distill.errors import InputError
from hf_distill.recipes import Recipe, arguments
from hf_distill.recipes.stages.annotation import WRITTEN, annotate_rows
from hf_distill.recipes.stages.evaluation import measure, write_report_and_card
from hf_distill.recipes.stages.given_models import given_labels
from hf_distill.recipes.stages.inputs import data_stamp, model_stamp, tokenizer_source
from hf_distill.recipes.stages.models import make_student
from hf_distill.recipes.stages.preparation import prepare_data
from hf_distill.recipes.stages.recording import SPLITS, record_teacher
from hf_distill.recipes.stages.stage import Run, Stage, remove, stamp_of
from hf_distill.recipes.stages.training import (
    distil,
    distil_off_policy,
    train_baseline,
    train_teacher,
)
from hf_distill.training.on_policy import OnPolicyArguments


def _decide_rows(recipe: Recipe) -> Any:
    source = tokenizer_source(recipe)
    data = recipe.data.model_dump(exclude={"num_proc"})  # which decides how fast, not what
    tokenizer = [recipe.tokenizer.vocab_size, source, model_stamp(source[0] if source else None)]
    keeps_text = recipe.annotate is not None and recipe.task == "causal-lm"
    return [
        recipe.task,
        recipe.seed,
        data,
        data_stamp(recipe.data),
        tokenizer,
        _given_teacher(recipe),
        keeps_text,
        *_given_classes(recipe),
    ]


def _given_classes(recipe: Recipe) -> list[Any]:
    """The classes of a model that decide the labels of the rows, where the task has classes."""
    given = given_labels(recipe)
    return [] if given is None else [asdict(given)]


def _given_teacher(recipe: Recipe) -> Any:
    """The source of a teacher that is not trained in this run; None for one that is."""
    section = recipe.teacher
    if section.is_trained_here:
        return None
    return section.model and [section.model, section.model_kwargs, model_stamp(section.model)]


def _without(section: dict[str, Any], *how_fast: str) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in how_fast}


def _decide_teacher(recipe: Recipe) -> Any:
    section = _without(recipe.resolved()["teacher"], "placement")
    return [recipe.seed, section, model_stamp(recipe.teacher.model)]


def _decide_annotation(recipe: Recipe) -> Any:
    assert recipe.annotate is not None
    written = _without(recipe.annotate.model_dump(), "batch_size")
    return [recipe.seed, written, _precision(recipe), _given_teacher(recipe)]


def _decide_recording(recipe: Recipe) -> Any:
    assert recipe.record is not None
    kept, train = _without(recipe.record.model_dump(), "batch_size"), arguments(recipe.train)
    said = {"temperature": train["temperature"], **_precision(recipe)}
    return [recipe.seed, kept, said, _given_teacher(recipe)]


def _precision(recipe: Recipe) -> dict[str, Any]:
    """That of the trainings, in which the teacher writes and is recorded."""
    train = arguments(recipe.train)
    return {key: train.get(key) for key in ("bf16", "fp16")}


def _decide_student(recipe: Recipe) -> Any:
    section = recipe.student
    made_of = [section.model_dump(exclude={"lora"}), model_stamp(section.model)]
    return [recipe.seed, made_of, section.from_teacher and _given_teacher(recipe)]


# With cross-entropy only, these settings affect only the logged divergence.
OF_THE_DIVERGENCE = {"alpha", "temperature", "divergence", "beta", "skew", "features"}
OF_THE_DIVERGENCE |= OnPolicyArguments.names()


def _decide_training(recipe: Recipe, section: Any, *, distilled: bool) -> Any:
    train = arguments(section)
    if not distilled:  # of the objective only the cross-entropy is left
        train = {key: v for key, v in train.items() if key not in OF_THE_DIVERGENCE}
    lora = recipe.student.lora and recipe.student.lora.model_dump()
    return [recipe.seed, train, lora, _given_teacher(recipe)]


def _decide_evaluation(recipe: Recipe) -> Any:
    harness = recipe.evaluate.harness
    # A folder of tasks is stamped as one of a model is.
    tasks = None if harness is None else model_stamp(harness.include_path)
    return [recipe.evaluate.model_dump(), tasks]


prepare = Stage(
    name="prepare",
    doing="collecting, cleaning and tokenizing the data",
    result="data",
    reads=_decide_rows,
    after=(),
    make=prepare_data,
)
teacher = Stage(
    name="teacher",
    doing="training the teacher",
    result="teacher",
    reads=_decide_teacher,
    after=(prepare,),
    make=train_teacher,
    everywhere=True,
    wanted=lambda recipe: recipe.teacher.is_trained_here,
)
annotate = Stage(
    name="annotate",
    doing="letting the teacher write the targets of the training rows",
    result="annotation",
    reads=_decide_annotation,
    after=(prepare, teacher),
    make=annotate_rows,
    everywhere=True,
    wanted=lambda recipe: recipe.annotate is not None,
    keeps=(WRITTEN,),
)
record = Stage(
    name="record",
    doing="recording the teacher's outputs",
    result="recording",
    reads=_decide_recording,
    after=(prepare, teacher, annotate),
    make=record_teacher,
    everywhere=True,
    wanted=lambda recipe: recipe.record is not None,
    keeps=SPLITS,
)
student = Stage(
    name="student",
    doing="making the initial student",
    result="student_initial",
    reads=_decide_student,
    after=(prepare, teacher),
    make=make_student,
)
baseline = Stage(
    name="baseline",
    doing="training the student with cross-entropy only",
    result="baseline",
    reads=lambda recipe: _decide_training(recipe, recipe.train, distilled=False),
    after=(teacher, record, student),
    make=train_baseline,
    everywhere=True,
    wanted=lambda recipe: recipe.baseline,
)
off_policy = Stage(
    name="off_policy",
    doing="distilling the student on the data rows",
    result="off_policy",
    reads=lambda recipe: _decide_training(recipe, recipe.off_policy, distilled=True),
    after=(teacher, annotate, record, student),
    make=distil_off_policy,
    everywhere=True,
    wanted=lambda recipe: recipe.off_policy is not None,
)
train = Stage(
    name="train",
    doing="distilling the student",
    result="student",
    reads=lambda recipe: _decide_training(recipe, recipe.train, distilled=True),
    after=(teacher, annotate, record, student, off_policy),
    make=distil,
    everywhere=True,
)
evaluate = Stage(
    name="evaluate",
    doing="measuring every model on the held-out rows",
    result="metrics.json",
    reads=_decide_evaluation,
    after=(teacher, student, baseline, off_policy, train),
    make=measure,
    everywhere=True,
)
report = Stage(
    name="report",
    doing="writing the report and the student's card",
    result="report.html",
    reads=lambda recipe: recipe.resolved(),
    after=(evaluate,),
    make=write_report_and_card,
)
STAGES = (
    prepare,
    teacher,
    annotate,
    record,
    student,
    baseline,
    off_policy,
    train,
    evaluate,
    report,
)


def measure_again(run: Run) -> None:
    """Run `evaluate` and `report` again; InputError if an earlier stage is not up to date."""
    *before, _, _ = STAGES
    stale = run.from_main(
        lambda: [s.name for s in before if s.wanted(run.recipe) and not run.is_made(s)]
    )
    if stale:
        raise InputError(
            f"{str(run.folder)!r} is not up to date with the recipe (stage {stale[0]}): "
            "let `hf-distill run` finish first"
        )
    for stage in (evaluate, report):
        run.from_main(partial(remove, stamp_of(run, stage)))
    evaluate(run)
    report(run)
