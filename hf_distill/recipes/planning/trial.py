"""Measure a few real steps of a recipe's training, with random weights and random tokens.

A trial is a separate process, so that its memory is that of a training alone.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import multiprocessing
import statistics
import tempfile
import time
from dataclasses import replace
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    TrainerCallback,
)

from hf_distill.errors import InputError, silence_libraries
from hf_distill.evaluation.performance import PeakMemory
from hf_distill.evaluation.speed import spread_of
from hf_distill.losses.fused_head import default_memory
from hf_distill.losses.linear_head import LinearHead
from hf_distill.losses.targets import IGNORE
from hf_distill.models.layer_selection import Stack, choose_layers
from hf_distill.models.loading import load_config
from hf_distill.models.narrower_config import narrower_configs
from hf_distill.models.shorter_config import find_stacks
from hf_distill.recipes import (
    Recipe,
    StudentSection,
    TeacherSection,
    arguments,
    dump_recipe,
    parse_recipe,
)
from hf_distill.recipes.planning.arithmetic import Measures, extrapolated
from hf_distill.recipes.stages.inputs import micro_batches, training_arguments
from hf_distill.recipes.stages.models import teaches_itself, with_adapters
from hf_distill.teachers import LiveTeacher
from hf_distill.training.trainer import DistillationTrainer

STEPS = 5  # of which the first is not counted
# Above these limits, trials have one and two layers: operations of a micro-batch; share of memory.
OPERATIONS, SHARE = 4e12, 0.5


def measures_of(recipe: Recipe, devices: int, say: Any = print) -> Measures:
    """Measures of the recipe's training on one of several devices, from trials on this machine.

    raises: InputError where they cannot share a step's rows evenly, or a trial fails
    """
    if recipe.task != "causal-lm":
        raise InputError(
            f"a plan is made for causal language models only, but the task is {recipe.task}: run "
            "the recipe with train.max_steps=20 to see its time and memory"
        )
    recipe = _on_one(recipe, devices)
    if writes(recipe):  # a live teacher judges, also beside a recording
        recipe = recipe.model_copy(update={"record": None})
    student, teacher = _configs(recipe)
    whole = _Sizes(recipe, student), _Sizes(recipe, teacher, role="teacher")
    if _is_small(recipe, *whole):
        say(f"trial: {STEPS} steps of the whole models")
        return _run(recipe, None, None)
    say(f"trial: {STEPS} steps each of models with one and two layers, for the whole ones")
    one, two, other = (_run(recipe, *layers) for layers in ((1, 1), (2, 1), (1, 2)))
    found = extrapolated(one, two, other, student.num_hidden_layers, teacher.num_hidden_layers)
    return replace(
        found,
        spread=max(trial.spread for trial in (one, two, other)),
        weights=whole[0].bytes,
        gradients=one.gradients / max(one.trained, 1) * _trained(recipe, student),
        optimizer=one.optimizer / max(one.trained, 1) * _trained(recipe, student),
        trained=_trained(recipe, student),
        teacher=0.0 if one.teacher == 0 else whole[1].bytes,
        teacher_layer=whole[1].layer,
        teacher_ends=whole[1].ends,
    )


def writes(recipe: Recipe) -> bool:
    """Whether the student writes in the training that is planned."""
    train = arguments(recipe.train)
    return bool(train["on_policy"] or train["on_policy_raise"])


def _on_one(recipe: Recipe, devices: int) -> Recipe:
    """The recipe with one device's share of a global batch in its train section."""
    train: Any = recipe.train
    if train.global_batch_size is None:
        return recipe
    share = micro_batches(train.global_batch_size, devices, train.per_device_train_batch_size)
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    changed = {"global_batch_size": None, **dict(zip(names, share, strict=True))}
    return recipe.model_copy(update={"train": train.model_copy(update=changed)})


def _run(recipe: Recipe, student_layers: int | None, teacher_layers: int | None) -> Measures:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(
        target=_in_child, args=(theirs, dump_recipe(recipe), student_layers, teacher_layers)
    )
    child.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        raise InputError(
            "the trial ended without an error message, probably for lack of memory: use a machine "
            "with more memory, or a smaller train.per_device_train_batch_size"
        ) from None
    finally:
        child.join()
    if isinstance(found, str):
        raise InputError(found)
    return found


def _in_child(
    answer: Any, text: str, student_layers: int | None, teacher_layers: int | None
) -> None:
    silence_libraries()
    # Warnings about random tokens and a missing tokenizer do not concern the recipe.
    logging.getLogger("hf_distill").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(None):  # Trainer's logs of random tokens
            found = _trial(parse_recipe(text), student_layers, teacher_layers)
        answer.send(found)
    except Exception as error:  # reported by the parent, which has no traceback of this process
        answer.send(f"the trial failed: {' '.join(str(error).split())}")


def _trial(recipe: Recipe, student_layers: int | None, teacher_layers: int | None) -> Measures:
    memory = PeakMemory()
    libraries = memory.now()
    student_config, teacher_config = _configs(recipe)
    student: Any = _model(_cut(student_config, student_layers), _dtype(recipe, "student"))
    if recipe.student.lora is not None:
        student = with_adapters(student, recipe)
    weights: float = sum(p.nbytes for p in student.parameters())
    vocabulary, length = student_config.get_text_config().vocab_size, recipe.data.max_length
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        settings = arguments(recipe.train) | _QUIET
        if writes(recipe):  # as many rows as ever in a step
            share = 1.0 if settings["on_policy_raise"] else settings["on_policy"]
            settings |= _WRITING | {"on_policy": share}
            student.generation_config.eos_token_id = None  # texts as long as they may be
        if recipe.record is not None:
            settings["alpha"] = 0.0  # costs the same as a recorded teacher, within a few percent
        args = training_arguments(recipe, settings, folder)
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * STEPS
        ids = torch.randint(0, vocabulary, (rows, length)).tolist()
        # With its text a row is as long as it may be.
        prompt = max(2, length - args.max_new_tokens) if args.on_policy else 0
        teacher = _teacher(recipe, _cut(teacher_config, teacher_layers), student)
        trainer = DistillationTrainer(
            student,
            teacher,
            args,
            train_dataset=[
                {"input_ids": row, "labels": [IGNORE] * prompt + row[prompt:]} for row in ids
            ],
            data_collator=_collate,
            callbacks=[clock],
        )
        memory.forget()
        trainer.train()
        peak = memory.peak()
    trained = [p for p in student.parameters() if p.requires_grad]
    states: Any = trainer.optimizer.state.values()  # type: ignore[union-attr]
    kept = [v for state in states for v in state.values() if isinstance(v, torch.Tensor)]
    optimizer = sum(value.nbytes for value in kept)
    own = isinstance(teacher, LiveTeacher)
    sizes = _Sizes(recipe, _cut(teacher_config, teacher_layers), role="teacher")
    saved = _Sizes(recipe, _cut(student_config, student_layers)).saved
    gradients = sum(p.nbytes for p in trained)
    tokens = args.per_device_train_batch_size * length
    head = min(_chunk(student), tokens * vocabulary * 8)
    known = libraries + weights + gradients + optimizer + head
    teacher_bytes = sum(p.nbytes for p in teacher.model.parameters()) if own else 0
    return Measures(
        libraries=libraries,
        weights=weights - saved,
        gradients=gradients,
        optimizer=optimizer,
        trained=sum(p.numel() for p in trained),
        student_dtype=trained[0].element_size(),
        engine_dtype=2 if args.bf16 or args.fp16 else trained[0].element_size(),
        teacher=teacher_bytes - (sizes.saved if own else 0),
        teacher_ends=sizes.ends,
        teacher_layer=sizes.layer,
        activations=max(0.0, peak - known - teacher_bytes),
        head=head,
        seconds=statistics.median(clock.seconds[1:]) / args.gradient_accumulation_steps,
        spread=spread_of(clock.seconds[1:]),
        tokens=tokens,
        accumulation=args.gradient_accumulation_steps,
        writing=_writing(trainer.state.log_history[1:]) / args.gradient_accumulation_steps,
    )


def _writing(log: list[dict[str, Any]]) -> float:
    """Seconds of writing for a step, of the entries of some steps; 0 where none was written."""
    found = [entry["writing_seconds"] for entry in log if "writing_seconds" in entry]
    return statistics.median(found) if found else 0.0


_QUIET = {
    "max_steps": STEPS,
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "report_to": "none",
}
_WRITING = {
    "on_policy_raise": 0.0,
    "on_policy_warmup": 0.0,
    "replay": 0.0,
    "keep_rows": False,
    "sample_steps": 0,
}


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)


class _Sizes:
    """Bytes of a model that is not made: all of its weights, one layer's, and the rest.

    saved: by quantisation, which trials do without; of the layers, as bitsandbytes leaves the
        embeddings and the output head as they are
    """

    def __init__(self, recipe: Recipe, config: PreTrainedConfig, role: str = "student") -> None:
        def count(layers: int | None) -> int:
            with init_empty_weights():
                model = AutoModelForCausalLM.from_config(_cut(config, layers))
            model.tie_weights()
            return model.num_parameters()

        each = torch.empty((), dtype=_dtype(recipe, role)).element_size()
        in_layer = _quantised_bytes(recipe, role) or each
        layers = config.get_text_config().num_hidden_layers
        self.parameters = count(None)
        layer = count(2) - count(1)
        self.layer = layer * in_layer
        self.ends = max(0, self.parameters - layer * layers) * each
        self.bytes = self.ends + self.layer * layers
        self.saved = self.parameters * each - self.bytes


def _quantised_bytes(recipe: Recipe, role: str) -> float | None:
    """Of one parameter in a layer; None where nothing is quantised."""
    wanted = getattr(recipe, role).model_kwargs.get("quantization_config") or {}
    if wanted.get("load_in_4bit"):
        return 0.5 + 4 / wanted.get("bnb_4bit_blocksize", 64)  # with the scale of each block
    return 1.0 if wanted.get("load_in_8bit") else None


def _is_small(recipe: Recipe, student: _Sizes, teacher: _Sizes) -> bool:
    batch = arguments(recipe.train).get("per_device_train_batch_size", 8)
    tokens = batch * recipe.data.max_length
    operations = tokens * (6 * student.parameters + 2 * teacher.parameters)
    memory = 4 * (student.bytes + student.saved) + teacher.bytes + teacher.saved
    limit = OPERATIONS * (200 if torch.cuda.is_available() else 1)
    return operations < limit and memory < SHARE * PeakMemory.available()


def _configs(recipe: Recipe) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    teacher = _config(recipe, recipe.teacher)
    section = recipe.student
    if not section.from_teacher:
        return _config(recipe, section), teacher
    if section.layers is None:
        return _narrower(teacher, section), teacher
    stack = Stack("layers", "layers", teacher.num_hidden_layers)
    # The plan needs their number only, so any scores will do.
    scores = {stack: [0.0] * stack.length}
    chosen = choose_layers([stack], section.layers, section.num_layers, scores)
    return _narrower(_cut(teacher, len(chosen[stack])), section), teacher


def _narrower(config: PreTrainedConfig, section: StudentSection) -> PreTrainedConfig:
    """The config with the widths of a student that is cut from its teacher."""
    if not section.widths:
        return config
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    return narrower_configs(whole, find_stacks(whole), section.widths)[-1].config


def _config(recipe: Recipe, section: StudentSection | TeacherSection) -> Any:
    settings, name = section.config, section.model
    if settings is None:
        role = "teacher" if isinstance(section, TeacherSection) else "student"
        return load_config(str(name), role, **section.model_kwargs)
    vocabulary: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    if recipe.tokenizer.vocab_size is not None:
        vocabulary["vocab_size"] = recipe.tokenizer.vocab_size
    kind, rest = settings["model_type"], {k: v for k, v in settings.items() if k != "model_type"}
    return CONFIG_MAPPING[kind](**(vocabulary | rest))


def _cut(config: PreTrainedConfig, layers: int | None) -> Any:
    """The same with so many layers only."""
    if layers is None:
        return config
    config = copy.deepcopy(config)
    text: Any = config.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    text.num_hidden_layers = layers
    return config


def _dtype(recipe: Recipe, role: str) -> torch.dtype:
    name = getattr(recipe, role).model_kwargs.get("dtype")
    name = None if name == "auto" else name  # as the checkpoint has it
    if name is None and role == "teacher" and recipe.teacher.model is not None:
        return _config(recipe, recipe.teacher).dtype or torch.float32
    return getattr(torch, str(name).removeprefix("torch.")) if name else torch.float32


def _model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _teacher(recipe: Recipe, config: PreTrainedConfig, student: Any) -> Any:
    if recipe.record is not None:
        return None
    if teaches_itself(recipe):
        return student
    return LiveTeacher(_model(config, _dtype(recipe, "teacher")))


def _trained(recipe: Recipe, config: PreTrainedConfig) -> int:
    if recipe.student.lora is None:
        return _Sizes(recipe, config).parameters
    with init_empty_weights():
        model = with_adapters(AutoModelForCausalLM.from_config(config), recipe)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _chunk(student: Any) -> float:
    base = student.get_base_model() if hasattr(student, "get_base_model") else student
    return default_memory(LinearHead(base.get_output_embeddings().weight))


def _collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}
