"""Check and make the parts of a trainer at construction: student, adapter, task, teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedTokenizerBase

from hf_distill.data import TEACHER_PROMPT_IDS
from hf_distill.errors import InputError, warn_once
from hf_distill.losses.divergences import Divergence
from hf_distill.losses.objective import Objective
from hf_distill.losses.targets import WEIGHTS
from hf_distill.models.base import base_model
from hf_distill.models.engines import compiles_in_one_graph, keep_unpacked
from hf_distill.models.probes import added_loss
from hf_distill.models.runner import ModelRunner
from hf_distill.models.vocabulary import (
    compare_tokens,
    same_embeddings,
    shared_vocabulary,
    suppress_unused_ids,
)
from hf_distill.recordings.reader import check_recording
from hf_distill.recordings.row_format import COLUMN, Header
from hf_distill.tasks import Task, find_task
from hf_distill.teachers import AdapterTeacher, Teacher, as_teacher
from hf_distill.training.arguments import DistillationArguments
from hf_distill.training.features import make_features
from hf_distill.training.loss import DistillationLoss
from hf_distill.training.student import load_student
from hf_distill.training.target_index import StepTargets
from hf_distill.training.turn_end import end_at_turns


def check_arguments(
    args: Any, others: dict[str, Any], kind: type[DistillationArguments]
) -> DistillationArguments:
    """The trainer's arguments; InputError for another class or an option that does not fit."""
    args = kind("trainer_output") if args is None else args
    if not isinstance(args, kind):
        raise InputError(
            f"args is a {type(args).__name__}, which lacks options of this trainer: use "
            f"hf_distill.{kind.__name__}, which takes the same options and more"
        )
    if others.get("compute_loss_func") is not None:
        raise InputError(
            "compute_loss_func would replace the whole objective: pass divergence=, or "
            "override extra_terms in a subclass"
        )
    return args


def make_student(
    model: Any,
    teacher: Any,
    args: DistillationArguments,
    peft_config: PeftConfig | None,
    task: str | None,
) -> Any:
    """The student to train: loaded, with its adapter, checked.

    task: its key, None for that of the model's class; see also `load_student`
    raises: InputError for a model that cannot be a student
    """
    if isinstance(model, str | Path):
        model = load_student(model, teacher, task, args)
    if peft_config is not None:
        if model is None:
            raise InputError("peft_config needs a model: with model_init, add the adapter there")
        if isinstance(model, PeftModel):
            raise InputError(
                "the student has an adapter already, and peft_config would add another one: leave "
                "out one of them"
            )
        model = get_peft_model(model, peft_config)
    if model is not None:
        check_student(model, task)
        _warn_of_base(model)
    return model


def _warn_of_base(model: Any) -> None:
    """Warn of an adapter on a base that is nowhere on disk, so that nothing saved would hold it."""
    configs = getattr(model, "peft_config", {}).values()
    if any(config.base_model_name_or_path in (None, "") for config in configs):
        warn_once(
            "The base of the student's adapter was made in memory, but only the adapter is saved: "
            "save the base first (base.save_pretrained(FOLDER)) and load it from there, or save "
            "the merged model (trainer.model.merge_and_unload().save_pretrained(FOLDER))."
        )


def check_student(model: Any, task: str | None) -> None:
    """InputError for a model without a task, without trainable weights, or with learned prompts."""
    find_task(model, "student", task)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(
            "the student has no trainable parameter: call model.requires_grad_(True), load its "
            "adapter with is_trainable=True, or pass peft_config="
        )
    for name, config in getattr(model, "peft_config", {}).items():
        if config.is_prompt_learning:  # its prompt comes before the tokens and moves every position
            raise InputError(
                f"adapter {name!r} is {config.peft_type.value}, whose learned prompt shifts the "
                "student's positions against the teacher's: use an adapter on the weights, such as "
                "LoRA"
            )


def make_runner(task: Task, trainer: Any, *, own_terms: bool) -> ModelRunner:
    """The student's runner. own_terms: whether a subclass overrides `extra_terms`."""
    runner = task.runner(trainer.model, "student", fused=trainer.args.fused_head, strict=True)
    if runner.fused and own_terms:
        runner.use_whole_logits("extra_terms may look at its logits")
    elif runner.fused and compiles_in_one_graph(trainer.accelerator):
        runner.use_whole_logits("it has to be compiled in one graph, the head included (fullgraph)")
    runner.may_meet_unknown_ids = False  # the collator refuses them
    keep_unpacked(trainer.model)
    return runner


def make_loss(trainer: Any, task_key: str | None) -> DistillationLoss:
    """The loss of a trainer's student and teacher."""
    suppress_unused_ids(base_model(trainer.model), trainer.processing_class)
    task = find_task(trainer.model, "student", task_key)
    teacher = getattr(trainer.teacher, "model", None)
    if teacher is not None:
        task.check_pair(base_model(trainer.model), base_model(teacher))
    trainer.accelerator.print(f"task: {task.name}")
    ended = end_at_turns(base_model(trainer.model), trainer.processing_class, trainer.train_dataset)
    if ended is not None:
        trainer.accelerator.print(f"the student's texts also end at {ended!r}, the end of a turn")
    return DistillationLoss(
        student=make_runner(task, trainer, own_terms=trainer.overrides("extra_terms")),
        teacher=trainer.teacher,
        task=task,
        step_targets=StepTargets(task),
        teacher_inputs=trainer.teacher_inputs,
        extra_terms=trainer.extra_terms,
        features=make_features(trainer),
        auxiliary_weight=auxiliary_weight(trainer.model) if task.fused else 0.0,
        judging=trainer._writer.judging,
    )


def make_teacher(
    teacher: Any,
    student: Any,
    args: DistillationArguments,
    task: str | None,
    tokenizer: Any,
    student_tokenizer: Any,
) -> Teacher | None:
    """The teacher for the given object; for the student itself, an `AdapterTeacher`.

    raises: InputError for an object that cannot be a teacher of this student
    """
    whole_logits = not args.fused_head
    # Its base model too: as a separate teacher it would freeze the weights below the adapter.
    if teacher is not None and any(teacher is part for part in (student, base_model(student))):
        teacher = AdapterTeacher(student, tokenizer=student_tokenizer, whole_logits=whole_logits)
    if student is not None:
        task = find_task(student, "student", task).key
    found = as_teacher(
        teacher,
        tokenizer,
        task=task,
        whole_logits=whole_logits,
        placement=args.teacher_placement,
        **args.model_kwargs("teacher"),
    )
    if isinstance(found, AdapterTeacher) and found.model is not student:
        raise InputError(
            "the AdapterTeacher holds another model than the student, but must share its weights: "
            "make it from the student, or give that model itself as the teacher"
        )
    return found


def own_columns(task: Task, recorded: Header | None) -> set[str]:
    """The columns of a data set for the objective, which the student's forward does not take."""
    more = [] if recorded is None else [COLUMN]
    return {*WEIGHTS, TEACHER_PROMPT_IDS, *task.withheld, *more}


def allow_wrapping(trainer: Any) -> None:
    """Let the engine wrap a student that was evaluated before it is trained.

    `Trainer.evaluate` marks the bare model as prepared. DDP would then leave it out, and each
    process would train a student of its own (transformers 5.23, accelerate 1.15).
    """
    if trainer.model_wrapped is trainer.model:
        vars(trainer.model).pop("_is_accelerate_prepared", None)


def shared_outcomes(
    loss: DistillationLoss, tokenizer: Any, teacher: Teacher | None, recorded: Header | None
) -> int:
    """The number of outcomes, from 0 on, that student and teacher share. The divergence uses these.

    raises: InputError where tokenizers or classes differ, or a recording and a teacher disagree
    """
    ours = loss.student.outcomes
    if teacher is None:
        return ours if recorded is None else recorded.vocabulary
    known = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None
    theirs = teacher.tokenizer
    if theirs is None and same_embeddings(loss.student.model, getattr(teacher, "model", None)):
        theirs = known  # the teacher's own vocabulary
    if loss.task.fused:
        shared = shared_vocabulary(ours, teacher.rows, known, theirs)
    else:
        compare_tokens(known, theirs)
        shared = ours
        if teacher.rows != ours:
            raise InputError(
                f"the student has {ours} outcomes and the teacher {teacher.rows}: their "
                "distributions cannot be compared"
            )
    if recorded is not None and recorded.vocabulary != shared:
        raise InputError(
            f"the recording is over {recorded.vocabulary} ids, but student and teacher share "
            f"{shared}: record with this teacher, or pass teacher=None"
        )
    return shared


def auxiliary_weight(model: Any) -> float:
    """The weight of the student's own auxiliary loss, which its forward adds if it sees labels.

    raises: InputError for a loss of the forward that is not the one in `outputs.aux_loss`
    """
    model = base_model(model)
    if any(hasattr(p, "ds_id") or p.is_meta for p in model.parameters()):  # no forward possible
        return _coefficient(model)
    added, auxiliary = added_loss(model)
    weight = _coefficient(model)
    explained = 0.0 if auxiliary is None else weight * auxiliary
    if abs(added - explained) > 1e-3 * max(1.0, abs(added)):
        settings = {
            k: v for k, v in model.config.get_text_config().to_dict().items() if "loss" in k and v
        }
        named = ", ".join(f"{k}={v}" for k, v in settings.items()) or "no config key names it"
        raise InputError(
            f"{type(model).__name__} adds {added:.4g} to its cross-entropy in its own forward "
            f"({named}), which the objective would leave out: set that key to 0, or add the loss "
            "in extra_terms of a subclass"
        )
    if weight and auxiliary is not None:
        warn_once("The student's router_aux_loss is part of the loss, with weight %s.", weight)
    return weight


def _coefficient(model: Any) -> float:
    config = model.config.get_text_config()
    for name in ("router_aux_loss_coef", "aux_loss_coef"):
        if (value := getattr(config, name, None)) is not None:
            return float(value)
    return 0.0


def make_objective(
    trainer: Any, loss: DistillationLoss, recorded: Header | None
) -> CurrentObjective:
    """The trainer's objective; InputError for tokenizers or a recording that do not fit."""
    outcomes = shared_outcomes(loss, trainer.processing_class, trainer.teacher, recorded)
    made = CurrentObjective(
        trainer.choose_divergence, loss.task, outcomes, recorded, loss.student.outcomes
    )
    made(trainer.args)
    return made


@dataclass
class CurrentObjective:
    """The objective of a trainer's arguments as they are now.

    Callbacks and hyperparameter searches change arguments after construction. Training and
    evaluation both take their objective here.
    choose_divergence: the trainer's hook; task: for the check that it has this divergence
    outcomes: how many the divergence runs over
    recorded, student_outcomes: for the check that a recording fits
    """

    choose_divergence: Callable[[], Divergence]
    task: Task
    outcomes: int
    recorded: Header | None
    student_outcomes: int
    _made: tuple[Any, Objective] | None = None

    def __call__(self, args: DistillationArguments) -> Objective:
        """raises: InputError for a value out of range, or one that the recording does not serve"""
        names = ("alpha", "temperature", "divergence", "beta", "skew", "head_memory_mb")
        settings = tuple(getattr(args, name) for name in names)
        if self._made is None or self._made[0] != settings:
            args.check_ranges()
            self._made = settings, self._make(args)
        return self._made[1]

    def _make(self, args: DistillationArguments) -> Objective:
        divergence = self.choose_divergence()
        self.task.check_divergence(divergence)
        if self.recorded is not None:
            check_recording(
                self.recorded,
                "the data set",
                temperature=args.temperature,
                divergence=divergence,
                student_rows=self.student_outcomes,
            )
        name = getattr(getattr(divergence, "func", divergence), "__name__", "divergence")
        name = name if name.isidentifier() else "divergence"  # a lambda is called "<lambda>"
        return Objective(
            args.alpha, args.temperature, divergence, name, self.outcomes, args.head_memory_mb
        )
