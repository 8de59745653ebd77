"""The sections of a recipe that are not trainings, each checked by itself."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import Field, model_validator

from hf_distill.errors import InputError
from hf_distill.models.layer_selection import check_num_layers
from hf_distill.models.narrower_config import Widths
from hf_distill.recipes.train_sections import (
    AdapterSection,
    AdaptSection,
    PretrainSection,
    Section,
)

AnySection = TypeVar("AnySection", bound=Section)


def _one_of(section: AnySection, *names: str, at_least: int = 1) -> AnySection:
    given = [name for name in names if getattr(section, name) is not None]
    if not at_least <= len(given) <= 1:
        what = " and ".join(repr(name) for name in given) or "none"
        raise ValueError(f"has {what}, but needs one of {', '.join(map(repr, names))}")
    return section


class LoraSection(AdapterSection):
    """A LoRA student."""

    merge: bool = False
    """Merge the adapters into the weights of the saved student."""


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
    """Hub id or folder of a model of the task; with `train` it may lack the head for the task."""
    model_kwargs: dict[str, Any] = Field(default={})
    """Passed to `from_pretrained`: dtype, revision, attn_implementation, ..."""
    placement: Literal["auto", "replicated", "sharded", "offloaded"] = "auto"
    """Where its weights are stored: `replicated`, `sharded`, `offloaded` or `auto`; see
    docs/scaling.md."""
    config: dict[str, Any] | None = None
    """Train a teacher from scratch instead: `model_type` and that model's settings."""
    train: PretrainSection | None = None  # type: ignore[valid-type]
    """Train the teacher on the same rows first, from `config` or `model`: fields of
    `transformers.TrainingArguments`."""
    adapt: AdaptSection | None = None  # type: ignore[valid-type]
    """Train `model` with cross-entropy on the same rows first: fields as in `teacher.train`.
    Figures before and after are reported."""

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
    """Beams of beam search; 1 is greedy search."""
    do_sample: bool = False
    """Sample the texts instead."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature, with `do_sample`."""
    n: int = Field(default=1, ge=1)
    """Texts for each row: the best beams, or samples."""
    keep_original: bool = False
    """Train the student on the original targets too."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of a text; by default `data.max_target_length`, or for causal language models
    half of `data.max_length`, at most 256."""
    batch_size: int = Field(default=8, ge=1)
    """Rows at a time on each device."""
    shard_rows: int = Field(default=1000, ge=1)
    """Rows of one file. An interruption loses at most one file of each process."""

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
    """`top_k`: the k most likely tokens and the total probability of all others; `sampled`: draws;
    `full`: all log-probabilities."""
    k: int = Field(default=64, ge=1, lt=2**16)
    """Tokens at each target, with `top_k`."""
    draws: int = Field(default=50, ge=1, lt=2**16)
    """Draws at each target, with `sampled`; for forward_kl only."""
    max_rows: int | None = Field(default=None, ge=1)
    """Record, and train on, a sample of this many training rows."""
    batch_size: int = Field(default=8, ge=1)
    """Rows at a time on each device."""
    shard_rows: int = Field(default=1000, ge=1)
    """Rows of one file. An interruption loses at most one file of each process."""


class StudentSection(Section):
    """The student before training. A string stands for `model`."""

    model: str | None = None
    """Hub id or folder of a model; one without a head for the task gets a new one."""
    model_kwargs: dict[str, Any] = Field(default={})
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
    """Train LoRA adapters on top of the student."""

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
        try:
            check_num_layers(self.layers, self.num_layers)
        except InputError as error:
            raise ValueError(f"is refused, since {error}") from error
        if self.model_kwargs and self.model is None:
            raise ValueError("has 'model_kwargs', which is for a student from 'model'")
        return _one_of(self, "model", "config", "layers", at_least=0 if self.widths else 1)


class HarnessSection(Section):
    """Benchmarks of lm-evaluation-harness (the extra `eval`)."""

    tasks: list[str] = Field(min_length=1)
    """Names of tasks or groups, of the harness or in `include_path`."""
    include_path: str | None = None
    """A folder with YAML files of further tasks."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first rows of each task, this many; by default all."""


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
    """Most tokens of a continuation; for encoder-decoders `data.max_target_length` applies."""
    written: int = Field(default=0, ge=0)
    """Held-out rows of each set for which causal models sample a text. It is compared with the
    reference and with the teacher's distributions."""
    num_beams: int = Field(default=1, ge=1)
    """Beams of beam search for encoder-decoders."""
    harness: HarnessSection | None = None
    """Also run benchmarks of lm-evaluation-harness, for teacher, baseline and student."""


class PublishSection(Section):
    """Where `hf-distill publish` puts the student."""

    repo_id: str | None = None
    """Repository on the Hub, owner/name."""
    private: bool = True
    """Whether a new repository is private."""
