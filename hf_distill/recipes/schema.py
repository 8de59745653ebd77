"""The typed form of a recipe, the YAML file that describes how a student is made.

Every key is declared, documented and given its default once: here, in `sections`, or for trainings
in `train_sections`. This module also checks that the sections fit each other.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from hf_distill.data import DataConfig
from hf_distill.data.prepare_tasks import FORMATS
from hf_distill.recipes.sections import (
    AnnotateSection,
    EvaluateSection,
    PublishSection,
    RecordSection,
    StudentSection,
    TeacherSection,
    TokenizerSection,
)
from hf_distill.recipes.train_sections import (
    PretrainSection,
    Section,
    TrainSection,
    arguments,
)

# Keys of `data` that only some tasks use, with these tasks.
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
# What names the columns of the tasks that do not use `data.columns`.
COLUMN_KEYS = {
    "masked-lm": "use data.text_column instead",
    "causal-lm": "use data.text_column, data.prompt_column or data.messages_column instead",
}
OTHER_FORMATS = ("source_target", "questions", "labelled", "tagged")
ANNOTATED = ("causal-lm", "seq2seq-lm")
NOT_RECORDED = {
    "masked-lm": "other tokens are masked in each epoch",
    "question-answering": "its outcomes are the positions of a row",
}


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
    """The rows and their preparation; see docs/data.md."""
    tokenizer: TokenizerSection = TokenizerSection()
    """The tokenizer. A string stands for `tokenizer.model`."""
    teacher: TeacherSection
    """The teacher. A string stands for `teacher.model`."""
    annotate: AnnotateSection | None = None
    """Let the teacher write the student's targets; the baseline keeps the original ones."""
    record: RecordSection | None = None
    """Record the teacher once and train from the recording; by default it runs during training."""
    student: StudentSection
    """The student before training. A string stands for `student.model`."""
    baseline: bool = True
    """Also train the student with cross-entropy only, on the same rows with the same steps."""
    off_policy: TrainSection | None = None  # type: ignore[valid-type]
    """A distillation on the data rows before `train`, which continues from its student; the same
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
                advice = COLUMN_KEYS[self.task] if name == "columns" else "leave it out"
                raise ValueError(
                    f"sets data.{name}, which the task {self.task} does not use (it is for "
                    f"{', '.join(tasks)}): {advice}"
                )
        return self

    @model_validator(mode="after")
    def _annotations_fit(self) -> Recipe:
        section = self.annotate
        if section is None:
            return self
        if self.task not in ANNOTATED:
            raise ValueError(
                f"has 'annotate' for the task {self.task}, whose models generate no text: leave it "
                "out"
            )
        if self.task == "causal-lm" and (section.max_new_tokens or 0) >= self.data.max_length:
            raise ValueError(
                f"has annotate.max_new_tokens {section.max_new_tokens}, but prompt and text "
                f"together have data.max_length, {self.data.max_length} tokens: ask for fewer"
            )
        return self

    @property
    def has_rows_of_the_student(self) -> bool:
        """Whether the student has training rows that the baseline does not have."""
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
                f"has {what}, which gives the student more rows than the baseline and so longer "
                "epochs: set train.max_steps, or baseline to false"
            )
        if self.record is not None and self.record.max_rows is not None:
            raise ValueError(
                f"has {what} and record.max_rows, which would give student and baseline different "
                "rows: set data.max_train_rows instead"
            )
        if self.data.unlabelled is not None and train["alpha"] == 0:
            raise ValueError(
                "has data.unlabelled and train.alpha 0, but rows without labels count in the "
                "divergence only: raise train.alpha"
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
    def _recording_has_one_temperature(self) -> Recipe:
        if self.record is None or self.record.kind == "full" or self.off_policy is None:
            return self
        first, second = (arguments(s)["temperature"] for s in (self.off_policy, self.train))
        if first != second:
            raise ValueError(
                f"has off_policy.temperature {first} and train.temperature {second}, but a "
                f"recording of the kind {self.record.kind} has one: make them equal, or set "
                "record.kind to full"
            )
        return self

    @model_validator(mode="after")
    def _on_policy_can_run(self) -> Recipe:
        """The checks of the trainer that would come after hours of earlier stages."""
        for name in ("off_policy", "train"):
            section = getattr(self, name)
            how = {} if section is None else arguments(section)
            if not (how.get("on_policy") or how.get("on_policy_raise")):
                continue
            if self.task not in ANNOTATED:
                raise ValueError(
                    f"has {name}.on_policy for the task {self.task}, whose students generate no "
                    "text: leave it out"
                )
            if self.task == "causal-lm" and self.data.packing:
                raise ValueError(
                    f"has {name}.on_policy, which needs one document a row: set data.packing to "
                    "false"
                )
            if how["on_policy_raise"] and how["eval_strategy"] == "no":
                raise ValueError(
                    f"has {name}.on_policy_raise, which follows the loss of evaluations: set "
                    f"{name}.eval_strategy to steps or epoch"
                )
            if how["teacher_mix"] and how["writing_backend"] == "vllm":
                raise ValueError(
                    f"has {name}.teacher_mix, which vLLM cannot sample from: set "
                    f"{name}.writing_backend to generate"
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
