"""The typed form of a recipe, the YAML file that describes how a student is made.

Every key is declared, documented and given its default here, once. The keys of the `train`
sections are the fields of `DistillationArguments` and `TrainingArguments` themselves.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import types
from enum import Enum
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator
from transformers import TrainingArguments

from hf_distill.data import DataConfig
from hf_distill.data.prepare_tasks import FORMATS
from hf_distill.models.narrower_config import Widths
from hf_distill.training.arguments import DistillationArguments

# The tasks that use a key of `data`, of the keys that not all tasks use.
_WINDOWS = ("question-answering",)
_TEXTS = ("seq2seq-lm",)
_CAUSAL = ("causal-lm",)
DATA_KEYS: dict[str, tuple[str, ...]] = {
    "columns": (
        "seq2seq-lm",
        "question-answering",
        "sequence-classification",
        "token-classification",
    ),
    "unlabelled": ("sequence-classification",),
    "max_target_length": _TEXTS,
    "prefix": _TEXTS,
    "source_lang": _TEXTS,
    "target_lang": _TEXTS,
    "stride": _WINDOWS,
    "mask_probability": ("masked-lm",),
    "text_column": ("causal-lm", "masked-lm"),
    "prompt_column": _CAUSAL,
    "completion_column": _CAUSAL,
    "messages_column": _CAUSAL,
    "prompts_as_chat": _CAUSAL,
    "separator": _CAUSAL,
    "packing": _CAUSAL,
    "packing_attention": _CAUSAL,
}
OTHER_FORMATS = ("source_target", "questions", "labelled", "tagged")
ANNOTATED = ("causal-lm", "seq2seq-lm")
NOT_RECORDED = {
    "masked-lm": "other tokens are masked in each epoch",
    "question-answering": "its outcomes are the positions of a row",
}


class Section(BaseModel):
    """A part of a recipe. Unknown keys are refused; values do not change after reading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True
    )


AnySection = TypeVar("AnySection", bound=Section)


def _one_of(section: AnySection, *names: str, at_least: int = 1) -> AnySection:
    given = [name for name in names if getattr(section, name) is not None]
    if not at_least <= len(given) <= 1:
        what = " and ".join(repr(name) for name in given) or "none"
        raise ValueError(f"has {what}, but needs one of {', '.join(map(repr, names))}")
    return section


# Keys that a recipe sets in another place, or that make no sense in it.
RESERVED = {
    "output_dir": "checkpoints go to the run folder, output_dir/name",
    "seed": "the recipe's own 'seed' sets it",
    "data_seed": "the recipe's own 'seed' sets it",
    "teacher_model_kwargs": "use 'teacher.model_kwargs'",
    "teacher_placement": "use 'teacher.placement'",
    "max_length": "use 'data.max_length'",
    "packing": "use 'data.packing'",
    "max_target_length": "use 'data.max_target_length'",
    "source_prefix": "use 'data.prefix'",
    "source_lang": "use 'data.source_lang'",
    "target_lang": "use 'data.target_lang'",
    "doc_stride": "use 'data.stride'",
    "mlm_probability": "use 'data.mask_probability'",
    "completion_only_loss": "prompt/completion rows always learn their completions only",
    "assistant_only_loss": "chat rows always learn the assistant's turns only",
    "student_model_kwargs": "use 'student.model_kwargs'",
    "resume_from_checkpoint": "an interrupted stage resumes by itself",
    "do_train": "the stages decide it",
    "do_eval": "the stages decide it",
    "do_predict": "the stages decide it",
    "prediction_loss_only": "the stages decide it",
    "remove_unused_columns": "the stages decide it",
    "push_to_hub": "run `hf-distill publish`",
    "hub_model_id": "use 'publish.repo_id'",
    "hub_private_repo": "use 'publish.private'",
    "hub_token": "log in with `hf auth login`",
    "hub_strategy": "run `hf-distill publish`",
    "hub_always_push": "run `hf-distill publish`",
    "hub_revision": "run `hf-distill publish`",
    "deepspeed": "use `accelerate launch --config_file`",
    "fsdp": "use `accelerate launch --config_file`",
    "fsdp_config": "use `accelerate launch --config_file`",
    "parallelism_config": "use `accelerate launch --config_file`",
    "accelerator_config": "use `accelerate launch --config_file`",
    "local_rank": "`accelerate launch` sets it",
}

# Trainer accepts any number for these, and fails later.
COUNTS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)

# How a training inside a recipe differs from a bare Trainer. Steps below 1 are shares of the run.
TRAIN_DEFAULTS: dict[str, Any] = {
    "report_to": "none",
    "disable_tqdm": False,
    "ddp_find_unused_parameters": False,
    "bf16": "auto",
    "logging_steps": 0.01,
    "eval_strategy": "steps",
    "eval_steps": 0.2,
    "save_steps": 0.1,
    "save_total_limit": 1,
}


def _plain(hint: Any) -> Any:
    """A field's type without enums and classes, which YAML cannot state."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    kept = [
        part
        for part in get_args(hint)
        if not isinstance(part, type) or part is type(None) or not issubclass(part, Enum)
    ]
    return functools.reduce(operator.or_, kept)


class AdapterSection(Section):
    """LoRA adapters, which are trained while the model itself is frozen (`peft`)."""

    r: int = Field(default=8, ge=1)
    """Rank of the adapters."""
    alpha: float = Field(default=16, gt=0)
    """Their scale is alpha / r (`lora_alpha`)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the adapters (`lora_dropout`)."""
    target_modules: str | list[str] | None = None
    """Names of the layers that get an adapter; by default those of peft for the model type."""
    modules_to_save: list[str] | None = None
    """Layers that are trained in full beside the adapters."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r)."""
    use_dora: bool = False
    """Adapt direction and length of the weights separately."""


class LoraSection(AdapterSection):
    """A LoRA student."""

    merge: bool = False
    """Merge the adapters into the weights of the saved student."""


class _Training(Section):
    """The keys of a train section beside the fields of its arguments class."""

    global_batch_size: int | None = Field(default=None, ge=1)
    """Rows of an optimizer step over all processes, so that a recipe means the same on any number
    of them. `per_device_train_batch_size`, if given, limits the rows at a time."""

    @model_validator(mode="after")
    def _one_batch_size(self) -> _Training:
        for name in ("gradient_accumulation_steps", "auto_find_batch_size"):
            if self.global_batch_size is not None and getattr(self, name):
                raise ValueError(
                    f"has 'global_batch_size' and {name!r}, but the first alone decides how many "
                    "rows a step takes: leave the second out"
                )
        return self


class _Adapting(_Training):
    """The keys of the adaptation of a teacher."""

    lora: AdapterSection | None = None
    """Train adapters, which are merged into the teacher; by default all of its weights."""


def _train_section(
    name: str, doc: str, arguments: type[TrainingArguments], base: type[Section] = _Training
) -> type[Section]:
    """A section with the fields of an arguments class; None leaves one to Trainer's default."""
    hints = get_type_hints(arguments)
    of_trainer = {field.name for field in dataclasses.fields(TrainingArguments)}
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(arguments):
        if not field.init or field.name in RESERVED:
            continue
        hint = _plain(hints[field.name])
        if field.name == "bf16":
            hint = bool | Literal["auto"]
        description = (field.metadata.get("help") or "").split("\n")[0]
        own = None if field.name in of_trainer else field.default
        default = TRAIN_DEFAULTS.get(field.name, own)
        least = 1 if field.name in COUNTS else None
        fields[field.name] = (
            hint | None,
            Field(default=default, description=description, ge=least),
        )
    return create_model(name, __base__=base, __doc__=doc, **fields)


PretrainSection = _train_section(
    "PretrainSection", "How the teacher is trained.", TrainingArguments
)
AdaptSection = _train_section(
    "AdaptSection", "How the teacher is adapted to the rows.", TrainingArguments, _Adapting
)
TrainSection = _train_section(
    "TrainSection", "How baseline and student are trained.", DistillationArguments
)


class TokenizerSection(Section):
    """The tokenizer. A string stands for `model`."""

    model: str | None = None
    """Hub id or folder; by default the student's own, otherwise the teacher's."""
    vocab_size: int | None = Field(default=None, ge=1)
    """Train a byte-level BPE of this many tokens on the prepared text instead."""

    @model_validator(mode="after")
    def _one_source(self) -> TokenizerSection:
        return _one_of(self, "model", "vocab_size", at_least=0)


class TeacherSection(Section):
    """The teacher. A string stands for `model`."""

    model: str | None = None
    """Hub id or folder of a model of the task; with `train` it may have no head for it yet."""
    model_kwargs: dict[str, Any] = {}
    """Passed to `from_pretrained`: dtype, revision, attn_implementation, ..."""
    placement: Literal["auto", "replicated", "sharded", "offloaded"] = "auto"
    """Where its weights are stored: whole on every device, in shards over them, or on the CPU."""
    config: dict[str, Any] | None = None
    """Train a teacher from scratch instead: `model_type` and that model's settings."""
    train: PretrainSection | None = None  # type: ignore[valid-type]
    """Its training on the same rows, from scratch or from `model`: fields of
    `transformers.TrainingArguments`."""
    adapt: AdaptSection | None = None  # type: ignore[valid-type]
    """Train `model` with cross-entropy on the same rows before it teaches: the same fields. Its
    figures before and after are reported."""

    @model_validator(mode="after")
    def _one_source(self) -> TeacherSection:
        if self.adapt is not None and self.model is None:
            raise ValueError("has 'adapt', which is for a teacher from 'model': use 'train'")
        if self.adapt is not None and "quantization_config" in self.model_kwargs:
            raise ValueError(
                "has 'adapt' and a quantised model, whose weights cannot be trained: leave one out"
            )
        _one_of(self, "train", "adapt", at_least=0)
        return _one_of(self, "model", "config")

    @property
    def is_trained_here(self) -> bool:
        """Whether the run trains it, from scratch or from `model`."""
        return self.config is not None or self.train is not None or self.adapt is not None


class AnnotateSection(Section):
    """Let the teacher write the targets that the student learns, before training."""

    num_beams: int = Field(default=1, ge=1)
    """Beams of the search for a text; 1 takes the likeliest token at each place."""
    do_sample: bool = False
    """Draw the texts instead."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature at which texts are drawn, with `do_sample`."""
    n: int = Field(default=1, ge=1)
    """Texts for each row: the best beams, or draws."""
    keep_original: bool = False
    """Let the student learn the original targets too."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Tokens of a text; by default `data.max_target_length`, for causal language models half of
    `data.max_length` and at most 256."""
    batch_size: int = Field(default=8, ge=1)
    """Rows at a time on each device."""
    shard_rows: int = Field(default=1000, ge=1)
    """Rows of one file, which is the most that an interruption loses."""

    @model_validator(mode="after")
    def _one_way_of_writing(self) -> AnnotateSection:
        if self.do_sample and self.num_beams > 1:
            raise ValueError(
                f"has do_sample and num_beams {self.num_beams}, but texts are either drawn or "
                "searched: leave one of them out"
            )
        if not self.do_sample and self.temperature != 1:
            raise ValueError("has 'temperature', which is for draws: set do_sample to true")
        if not self.do_sample and self.n > self.num_beams:
            raise ValueError(
                f"asks for {self.n} texts of a row, but {self.num_beams} "
                f"beam{'s find' if self.num_beams > 1 else ' finds'} {self.num_beams}: set "
                "num_beams or do_sample"
            )
        return self


class RecordSection(Section):
    """Run the teacher once, at `train.temperature`, and train from its recorded outputs."""

    kind: Literal["top_k", "sampled", "full"] = "top_k"
    """`top_k`: the k likeliest tokens and the mass of all others; `sampled`: draws; `full`: all."""
    k: int = Field(default=64, ge=1, lt=2**16)
    """Tokens of `top_k` at each target."""
    draws: int = Field(default=50, ge=1, lt=2**16)
    """Draws of `sampled` at each target; for forward_kl only."""
    max_rows: int | None = Field(default=None, ge=1)
    """Record, and train on, a sample of this many training rows."""
    batch_size: int = Field(default=8, ge=1)
    """Rows at a time on each device."""
    shard_rows: int = Field(default=1000, ge=1)
    """Rows of one file, which is the most that an interruption loses."""


class StudentSection(Section):
    """The student before training. A string stands for `model`."""

    model: str | None = None
    """Hub id or folder of a model; one without a head for the task gets a new one."""
    model_kwargs: dict[str, Any] = {}
    """Passed to `from_pretrained`; the weights are float32 unless `dtype` says otherwise."""
    config: dict[str, Any] | None = None
    """Random weights instead: `model_type` and that model's settings."""
    layers: str | list[int] | dict[str, str | list[int]] | None = None
    """Layers of the teacher: every_other, first_and_last, influence, or a list of indices; for an
    encoder-decoder also {encoder: ..., decoder: ...}."""
    num_layers: int | None = Field(default=None, ge=1)
    """Number of layers that `first_and_last` and `influence` take."""
    ffn: int | float | None = None
    """Neurons of each feed-forward network of the teacher to keep: a number or a share."""
    heads: int | float | None = None
    """Attention heads of each layer of the teacher to keep: a number or a share."""
    hidden: int | float | None = None
    """Features of the teacher's hidden states to keep: a number or a share."""
    lora: LoraSection | None = None
    """Train adapters on top of any of these."""

    @property
    def widths(self) -> Widths:
        """The widths of a student that is cut from the teacher."""
        return Widths(self.ffn, self.heads, self.hidden)

    @property
    def from_teacher(self) -> bool:
        """Whether the student is made of the teacher's layers and units."""
        return self.layers is not None or bool(self.widths)

    @model_validator(mode="after")
    def _one_source(self) -> StudentSection:
        if self.widths and (self.model is not None or self.config is not None):
            raise ValueError(
                "has a width ('ffn', 'heads', 'hidden'), which is for a student from the teacher, "
                "not from 'model' or 'config'"
            )
        if self.num_layers is not None and self.layers is None:
            raise ValueError("has 'num_layers', which is for a student from 'layers'")
        if self.model_kwargs and self.model is None:
            raise ValueError("has 'model_kwargs', which is for a student from 'model'")
        return _one_of(self, "model", "config", "layers", at_least=0 if self.widths else 1)


class HarnessSection(Section):
    """Benchmarks of lm-evaluation-harness (the extra `eval`)."""

    tasks: list[str] = Field(min_length=1)
    """Names of its tasks or groups, or of those in `include_path`."""
    include_path: str | None = None
    """A folder with YAML files of further tasks."""
    limit: int | None = Field(default=None, ge=1)
    """Rows of each task, the first ones; by default all."""


class EvaluateSection(Section):
    """What is measured at the end."""

    batch_size: int = Field(default=8, ge=1)
    """Rows at a time on each device; the figures do not depend on it."""
    speed: bool = True
    """Also measure speed and peak memory."""
    prompts: int = Field(default=4, ge=0)
    """Held-out rows for which the report shows what every model predicts."""
    prompt_tokens: int = Field(default=32, ge=1)
    """Tokens of a prompt, where rows have no prompt of their own."""
    max_new_tokens: int = Field(default=48, ge=1)
    """Tokens of a continuation; encoder-decoders write `data.max_target_length`."""
    written: int = Field(default=0, ge=0)
    """Held-out rows of each set after which causal models draw a text, which is compared with the
    reference and judged by the teacher."""
    num_beams: int = Field(default=1, ge=1)
    """Beams with which an encoder-decoder writes."""
    harness: HarnessSection | None = None
    """Also run benchmarks of lm-evaluation-harness, for teacher, baseline and student."""


class PublishSection(Section):
    """Where `hf-distill publish` puts the student."""

    repo_id: str | None = None
    """Repository on the Hub, owner/name."""
    private: bool = True
    """Whether a new repository is private."""


class Recipe(Section):
    """One YAML file: everything that decides what a run does."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run folder; by default that of the YAML file."""
    seed: int = Field(default=42, ge=0)
    """Decides held-out rows, initial weights, order of the rows and dropout."""
    output_dir: str = "runs"
    """Where run folders are made."""
    task: Literal[
        "causal-lm",
        "seq2seq-lm",
        "masked-lm",
        "sequence-classification",
        "token-classification",
        "question-answering",
    ] = "causal-lm"
    """What the models predict; see docs/recipes.md."""
    data: DataConfig
    """The rows and their preparation; the keys are in docs/data.md."""
    tokenizer: TokenizerSection = TokenizerSection()
    """The tokenizer. A string stands for `tokenizer.model`."""
    teacher: TeacherSection
    """The teacher. A string stands for `teacher.model`."""
    annotate: AnnotateSection | None = None
    """Let the teacher write the targets that the student learns; the baseline keeps the original
    ones."""
    record: RecordSection | None = None
    """Record the teacher once and train from the recording; by default it runs during training."""
    student: StudentSection
    """The student before training. A string stands for `student.model`."""
    baseline: bool = True
    """Also train the student with cross-entropy only, on equal terms."""
    off_policy: TrainSection | None = None  # type: ignore[valid-type]
    """A distillation on the data rows before `train`, which goes on from its student; the same
    fields as `train`."""
    train: TrainSection = TrainSection()  # type: ignore[valid-type]
    """The training of baseline and student: fields of `DistillationArguments`."""
    evaluate: EvaluateSection = EvaluateSection()
    """What is measured at the end."""
    publish: PublishSection = PublishSection()
    """Where `hf-distill publish` puts the student."""

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, values: Any) -> Any:
        """A string for a model; a key without a value, as `train:`, for its default."""
        shorthand = ("tokenizer", "teacher", "student")
        if not isinstance(values, dict):
            return values
        return {
            key: {"model": value} if key in shorthand and isinstance(value, str) else value
            for key, value in values.items()
            if value is not None
        }

    @model_validator(mode="after")
    def _data_fit_the_task(self) -> Recipe:
        wanted = FORMATS.get(self.task)
        given = self.data.format
        if given != "auto" and (given in OTHER_FORMATS or wanted) and given != wanted:
            formats = wanted or "text, prompt_completion or chat"
            raise ValueError(
                f"has the task {self.task} and data.format {given}, but that task takes {formats}: "
                "leave data.format out"
            )
        if self.task != "causal-lm" and isinstance(self.data.train, dict):
            raise ValueError(
                f"has several sets in data.train, which are for causal-lm and not for {self.task}: "
                "give a list of files"
            )
        for name, tasks in DATA_KEYS.items():
            default = type(self.data).model_fields[name].get_default(call_default_factory=True)
            if self.task not in tasks and getattr(self.data, name) != default:
                raise ValueError(
                    f"sets data.{name}, which the task {self.task} does not use (but "
                    f"{', '.join(tasks)}): leave it out"
                )
        return self

    @model_validator(mode="after")
    def _annotations_fit(self) -> Recipe:
        section = self.annotate
        if section is None:
            return self
        if self.task not in ANNOTATED:
            raise ValueError(
                f"has 'annotate' for the task {self.task}, whose models write no text: leave it out"
            )
        if self.task == "causal-lm" and (section.max_new_tokens or 0) >= self.data.max_length:
            raise ValueError(
                f"has annotate.max_new_tokens {section.max_new_tokens}, but prompt and text "
                f"together have data.max_length, {self.data.max_length} tokens: ask for fewer"
            )
        return self

    @property
    def has_rows_of_the_student(self) -> bool:
        """Whether the student learns rows that the baseline does not."""
        return self.annotate is not None or self.data.unlabelled is not None

    @model_validator(mode="after")
    def _student_and_baseline_are_alike(self) -> Recipe:
        if not self.has_rows_of_the_student:
            return self
        what = "'annotate'" if self.annotate is not None else "data.unlabelled"
        train, section = arguments(self.train), self.annotate
        longer = section is None or section.n > 1 or section.keep_original
        if self.baseline and longer and train.get("max_steps", -1) <= 0:
            raise ValueError(
                f"has {what}, by which the student learns more rows than the baseline, so that its "
                "epochs are longer: set train.max_steps, or baseline to false"
            )
        if self.record is not None and self.record.max_rows is not None:
            raise ValueError(
                f"has {what} and record.max_rows, which would leave the student other rows than "
                "the baseline: set data.max_train_rows instead"
            )
        if self.data.unlabelled is not None and train["alpha"] == 0:
            raise ValueError(
                "has data.unlabelled and train.alpha 0, but rows without labels are learnt from "
                "the teacher alone: raise train.alpha"
            )
        return self

    @model_validator(mode="after")
    def _written_texts_fit_the_task(self) -> Recipe:
        if self.evaluate.written and self.task != "causal-lm":
            raise ValueError(
                f"has evaluate.written for the task {self.task}, but that is for causal-lm "
                "(encoder-decoders always write): leave it out"
            )
        return self

    @model_validator(mode="after")
    def _harness_fits_the_task(self) -> Recipe:
        if self.evaluate.harness is not None and self.task != "causal-lm":
            raise ValueError(
                f"has 'evaluate.harness' for the task {self.task}, but its benchmarks are for "
                "causal-lm: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _adaptation_fits_the_task(self) -> Recipe:
        if self.teacher.adapt is not None and self.task != "causal-lm":
            raise ValueError(
                f"has 'teacher.adapt' for the task {self.task}, but that is for causal-lm: use "
                "'teacher.train', which trains a teacher from 'model' on the rows of any task"
            )
        return self

    @model_validator(mode="after")
    def _recordings_fit_the_task(self) -> Recipe:
        if self.record is not None and self.task in NOT_RECORDED:
            raise ValueError(
                f"has 'record' for the task {self.task}, whose teacher cannot be recorded, since "
                f"{NOT_RECORDED[self.task]}: leave 'record' out"
            )
        return self

    @model_validator(mode="after")
    def _features_have_a_teacher(self) -> Recipe:
        sections: list[Any] = [s for s in (self.train, self.off_policy) if s is not None]
        if self.record is not None and any(arguments(s).get("features") for s in sections):
            raise ValueError(
                "has 'record' and 'train.features', but a recording has no inner states of the "
                "teacher: leave out one of them"
            )
        return self

    @model_validator(mode="after")
    def _draws_estimate_the_forward_kl(self) -> Recipe:
        sections: list[Any] = [self.train, self.off_policy]
        used = [arguments(section)["divergence"] for section in sections if section is not None]
        divergence = next((name for name in used if name != "forward_kl"), "forward_kl")
        if self.record and self.record.kind == "sampled" and divergence != "forward_kl":
            raise ValueError(
                f"records draws, which estimate forward_kl without bias but not {divergence}: set "
                "train.divergence to forward_kl, or record.kind to top_k"
            )
        return self

    @model_validator(mode="after")
    def _tokenizer_has_a_source(self) -> Recipe:
        models = (self.tokenizer.model, self.student.model, self.teacher.model)
        if self.tokenizer.vocab_size is None and not any(models):
            raise ValueError(
                "has neither a model nor a tokenizer to take tokens from: set tokenizer.vocab_size "
                "to train one, or tokenizer.model"
            )
        if self.tokenizer.vocab_size is not None and any(models):
            raise ValueError(
                "sets tokenizer.vocab_size, but a new tokenizer does not fit a model that exists: "
                "leave it out, or give teacher and student by config"
            )
        return self

    def resolved(self) -> dict[str, Any]:
        """All settings with the defaults of a recipe, without those of Trainer."""
        left_out: Any = {"train": True, "off_policy": True, "teacher": {"train", "adapt"}}
        dump = self.model_dump(mode="json", exclude=left_out)
        dump["train"] = arguments(self.train)
        dump["off_policy"] = self.off_policy and arguments(self.off_policy)
        if self.teacher.adapt is not None:
            dump["teacher"]["adapt"] = arguments(self.teacher.adapt)
        elif self.teacher.is_trained_here:
            dump["teacher"]["train"] = arguments(self.teacher.train or PretrainSection())
        return {key: dump[key] for key in type(self).model_fields}


def arguments(section: Section) -> dict[str, Any]:
    """The keyword arguments that a train section sets."""
    return section.model_dump(mode="json", exclude_none=True)
