"""What a trainer checks and makes at construction: the student, its adapter, its task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.errors import InputError, warn_once
from hf_distill.losses.divergences import Divergence
from hf_distill.losses.objective import Objective
from hf_distill.models.base import base_model
from hf_distill.models.engines import compiles_in_one_graph, keep_unpacked
from hf_distill.models.loading import load_model
from hf_distill.models.probes import added_loss
from hf_distill.models.runner import ModelRunner
from hf_distill.models.vocabulary import shared_vocabulary
from hf_distill.recordings.reader import check_recording
from hf_distill.recordings.row_format import Header
from hf_distill.tasks import find_task
from hf_distill.teachers import AdapterTeacher, Teacher, as_teacher
from hf_distill.training.arguments import DistillationArguments


def check_arguments(args: Any, others: dict[str, Any]) -> DistillationArguments:
    """The trainer's arguments; InputError for what it cannot honour."""
    args = DistillationArguments("trainer_output") if args is None else args
    if not isinstance(args, DistillationArguments):
        raise InputError(
            f"args is a {type(args).__name__}, which has no alpha or temperature: "
            "use hf_distill.DistillationArguments, which takes the same options and these"
        )
    if others.get("compute_loss_func") is not None:
        raise InputError(
            "compute_loss_func would replace the whole objective: pass divergence=, or "
            "override extra_terms in a subclass"
        )
    return args


def make_student(model: Any, args: DistillationArguments, peft_config: PeftConfig | None) -> Any:
    """The student as it will be trained: loaded, with its adapter, checked.

    raises: InputError for what cannot be a student
    """
    if isinstance(model, str | Path):
        model = load_model(model, "student", **args.model_kwargs("student"))
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
        check_student(model)
    return model


def check_student(model: Any) -> None:
    """InputError for a model without a task, without trainable weights, or with learned prompts."""
    find_task(model, "student")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(
            "the student has no trainable parameter: call model.requires_grad_(True), load its "
            "adapter with is_trainable=True, or pass peft_config="
        )
    for name, config in getattr(model, "peft_config", {}).items():
        if config.is_prompt_learning:  # its prompt comes before the tokens and moves every position
            raise InputError(
                f"adapter {name!r} is {config.peft_type.value}, whose learned prompt gives the "
                "student other positions than the teacher has: use an adapter on the weights, as "
                "LoRA"
            )


def make_runner(trainer: Any, *, own_terms: bool) -> ModelRunner:
    """The student's runner. own_terms: whether a subclass overrides `extra_terms`."""
    runner = ModelRunner(trainer.model, "student", fused=trainer.args.fused_head, strict=True)
    if runner.fused and own_terms:
        runner.use_whole_logits("extra_terms may look at its logits")
    elif runner.fused and compiles_in_one_graph(trainer.accelerator):
        runner.use_whole_logits("it has to be compiled in one graph, the head included (fullgraph)")
    runner.may_meet_unknown_ids = False  # the collator refuses them
    keep_unpacked(trainer.model)
    return runner


def make_teacher(
    teacher: Any, student: Any, args: DistillationArguments, tokenizer: Any, student_tokenizer: Any
) -> Teacher | None:
    """The teacher of whatever was given; of the student itself an `AdapterTeacher`.

    raises: InputError for what cannot be a teacher of this student
    """
    whole_logits = not args.fused_head
    # Its base model too: as a separate teacher it would freeze the weights below the adapter.
    if teacher is not None and any(teacher is part for part in (student, base_model(student))):
        teacher = AdapterTeacher(student, tokenizer=student_tokenizer, whole_logits=whole_logits)
    if isinstance(teacher, PreTrainedModel | PeftModel):
        find_task(teacher, "teacher")
    found = as_teacher(
        teacher,
        tokenizer,
        whole_logits=whole_logits,
        placement=args.teacher_placement,
        **args.model_kwargs("teacher"),
    )
    if isinstance(found, AdapterTeacher) and found.model is not student:
        raise InputError(
            "the AdapterTeacher holds another model than the student, whose weights it is to "
            "share: make it of the student, or give that model itself as the teacher"
        )
    return found


def vocabulary_of(
    student_rows: int, tokenizer: Any, teacher: Teacher | None, recorded: Header | None
) -> int:
    """How many ids the divergence runs over.

    raises: InputError where tokenizers differ, or a recording and a teacher disagree
    """
    if teacher is None:
        return student_rows if recorded is None else recorded.vocabulary
    known = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None
    shared = shared_vocabulary(student_rows, teacher.rows, known, teacher.tokenizer)
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
    if any(hasattr(p, "ds_id") or p.is_meta for p in model.parameters()):  # no forward without all
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


def make_objective(trainer: Any, student_rows: int, recorded: Header | None) -> CurrentObjective:
    """The trainer's objective; InputError for tokenizers or a recording that do not fit."""
    vocabulary = vocabulary_of(student_rows, trainer.processing_class, trainer.teacher, recorded)
    made = CurrentObjective(trainer.choose_divergence, vocabulary, recorded, student_rows)
    made(trainer.args)
    return made


@dataclass
class CurrentObjective:
    """The objective of a trainer's arguments as they are now.

    Callbacks and hyperparameter searches change arguments after construction. Training and
    evaluation both take their objective here.
    choose_divergence: the trainer's hook; vocabulary: how many ids the divergence runs over
    recorded, student_rows: for the check that a recording fits
    """

    choose_divergence: Callable[[], Divergence]
    vocabulary: int
    recorded: Header | None
    student_rows: int
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
        if self.recorded is not None:
            check_recording(
                self.recorded,
                "the data set",
                temperature=args.temperature,
                divergence=divergence,
                student_rows=self.student_rows,
            )
        name = getattr(getattr(divergence, "func", divergence), "__name__", "divergence")
        name = name if name.isidentifier() else "divergence"  # a lambda is called "<lambda>"
        return Objective(
            args.alpha, args.temperature, divergence, name, self.vocabulary, args.head_memory_mb
        )
