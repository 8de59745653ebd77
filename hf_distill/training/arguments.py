"""The settings of a distillation, in addition to those of `TrainingArguments`."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hf_distill.errors import InputError
from hf_distill.losses.divergences import DIVERGENCES, named_divergence
from hf_distill.teachers.placement import check_placement
from hf_distill.training.feature_settings import KINDS, feature_settings
from hf_distill.training.on_policy.arguments import OnPolicyArguments

# The packages, any one of them, that the trackers of the extra "trackers" need.
TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}


@dataclass
class DistillationArguments(OnPolicyArguments):
    """`transformers.TrainingArguments` with the settings of a distillation.

    raises: InputError for a value out of range, or an option that does not fit distillation
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012 - as in the base class, which is no ClassVar
        *TrainingArguments._VALID_DICT_FIELDS,
        "teacher_model_kwargs",
        "student_model_kwargs",
        "features",
    ]

    alpha: float = field(
        default=0.5,
        metadata={"help": "Weight of the divergence, 0 to 1; the cross-entropy has 1 - alpha."},
    )
    temperature: float = field(
        default=1.0,
        metadata={"help": "Softens both distributions in the divergence, which is scaled by T^2."},
    )
    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": f"One of {', '.join(DIVERGENCES)}. Pass a function of your own to the trainer."
        },
    )
    beta: float = field(
        default=0.5, metadata={"help": "Weight of the teacher in `jsd`, between 0 and 1."}
    )
    skew: float = field(
        default=0.1,
        metadata={"help": "How much of the first distribution the skewed KLs mix into the second."},
    )
    features: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Losses between internal states of student and teacher: weights for any of "
            f"{', '.join(KINDS)}; see docs/features.md."
        },
    )
    fused_head: bool = field(
        default=True,
        metadata={
            "help": "Compute loss and gradients at the output head chunk by chunk, without whole "
            "logits. A head that is not a plain linear layer switches this off, with a message."
        },
    )
    head_memory_mb: int | None = field(
        default=None,
        metadata={
            "help": "Memory in MB for the logits of student and teacher at a time; by default "
            "136, or three quarters of the size of the output head's gradient if that is more."
        },
    )
    mixed_recordings: bool = field(
        default=False,
        metadata={"help": "Allow recordings of different teachers in one data set."},
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Raw rows: most tokens of a row, of a source, or of a question with its part "
            "of the context. By default 1024, for questions 384, or fewer if student or tokenizer "
            "take fewer."
        },
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Raw rows: fill rows of max_length tokens with several documents."},
    )
    completion_only_loss: bool | None = field(
        default=None,
        metadata={
            "help": "Raw rows: loss on completions only. By default True for prompt/completion "
            "rows."
        },
    )
    assistant_only_loss: bool = field(
        default=False,
        metadata={"help": "Raw rows of messages: loss on the assistant's turns only."},
    )
    max_target_length: int | None = field(
        default=None,
        metadata={
            "help": "Raw rows of an encoder-decoder: most tokens of a target text. By default "
            "128, or fewer if student or tokenizer take fewer."
        },
    )
    source_prefix: str = field(
        default="",
        metadata={"help": "Raw rows of an encoder-decoder: text put before each source."},
    )
    source_lang: str | None = field(
        default=None,
        metadata={
            "help": "Raw rows of translations: the language of the sources. Names a field of "
            "`translation` and, if the tokenizer has language codes, one of these."
        },
    )
    target_lang: str | None = field(
        default=None, metadata={"help": "Raw rows of translations: the language of the targets."}
    )
    doc_stride: int | None = field(
        default=None,
        metadata={
            "help": "Raw rows of questions: tokens that consecutive windows of a long context "
            "share. By default a third of max_length."
        },
    )
    mlm_probability: float = field(
        default=0.15,
        metadata={"help": "Masked language modelling: the share of tokens that is masked."},
    )
    teacher_placement: str = field(
        default="auto",
        metadata={
            "help": "Where the teacher's weights are stored: 'replicated' on every device, "
            "'sharded' over the devices, 'offloaded' to the CPU, or 'auto' by their size."
        },
    )
    teacher_model_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Passed to from_pretrained if the teacher is an id or a path."},
    )
    student_model_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Passed to from_pretrained if the student is an id or a path."},
    )

    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Trainer's filter for losses that are not finite. It waits for the device "
            "after each micro-batch. Without it, such a loss ends the training; under fp16 the "
            "step is skipped, and the log replaces its loss by the mean of the others."
        },
    )

    def __post_init__(self) -> None:
        self.check_ranges()
        chosen = _settings_named_by(self.accelerator_config)
        super().__post_init__()
        loading: Any = self.accelerator_config  # post-init has read any dictionary or JSON file
        if "non_blocking" not in chosen:
            # From pinned memory, a batch is copied while the previous step runs. Without pinned
            # memory, copies block in any case.
            loading.non_blocking = self.dataloader_pin_memory
        if loading.dispatch_batches is None:
            # Each process reads its own rows of a stream. By accelerate's default one process joins
            # the batches of all, which fails if batches are padded to different widths.
            loading.dispatch_batches = False
        feature_settings(self.features)
        self._refuse_unsupported()

    def model_kwargs(self, role: str) -> dict[str, Any]:
        """The keywords of `from_pretrained` for the "teacher" or the "student"."""
        value = getattr(self, f"{role}_model_kwargs")
        return value if isinstance(value, dict) else {}  # post-init has read any JSON string

    def _refuse_unsupported(self) -> None:
        for tracker in self.report_to if isinstance(self.report_to, list) else ():
            packages = TRACKERS.get(tracker, ())
            if packages and not any(map(find_spec, packages)):
                raise InputError(
                    f"report_to is {tracker!r}, but {packages[0]} is not installed: "
                    f"pip install 'hf-distill[trackers]', or {packages[0]} alone"
                )
        if self.label_smoothing_factor:
            raise InputError(
                f"label_smoothing_factor is {self.label_smoothing_factor}, but distillation does "
                "not apply it, since the teacher's distribution smooths the labels: set it to 0"
            )
        if self.use_liger_kernel:
            raise InputError(
                "use_liger_kernel replaces the student's forward and hides the logits that the "
                "divergence needs: set it to False"
            )
        if self.parallelism_config is not None:
            raise InputError(
                "parallelism_config splits sequences or tensors over devices, which the divergence "
                "does not support: use DDP, DeepSpeed or FSDP through `accelerate launch` instead"
            )
        if self.push_to_hub and self.hub_strategy in ("checkpoint", "all_checkpoints"):
            raise InputError(
                f"hub_strategy is {str(self.hub_strategy)!r}, which publishes pickled optimizer "
                "states: use 'every_save' or 'end'"
            )
        if self.n_gpu > 1:
            raise InputError(
                f"this process sees {self.n_gpu} GPUs and would use nn.DataParallel, which "
                "averages losses wrongly: start it with `accelerate launch`"
            )

    def check_ranges(self) -> None:
        """InputError for a value out of range; again where values change after construction."""
        named_divergence(self.divergence)
        check_placement(self.teacher_placement)
        ranges = {
            "alpha": (0 <= self.alpha <= 1, "between 0 and 1"),
            "temperature": (0 < self.temperature < float("inf"), "above 0"),
            "beta": (0 < self.beta < 1, "strictly between 0 and 1"),
            "head_memory_mb": (
                self.head_memory_mb is None or self.head_memory_mb >= 1,
                "at least 1",
            ),
            # Trainer trains by epochs for any number below 1, as if it had not been given.
            "max_steps": (
                self.max_steps == -1 or self.max_steps >= 1,
                "-1 (by epochs) or positive",
            ),
            "skew": (0 < self.skew < 1, "strictly between 0 and 1"),
            "max_length": (self.max_length is None or self.max_length >= 2, "at least 2"),
            "max_target_length": (
                self.max_target_length is None or self.max_target_length >= 2,
                "at least 2",
            ),
            "doc_stride": (self.doc_stride is None or self.doc_stride >= 0, "at least 0"),
            "mlm_probability": (0 < self.mlm_probability < 1, "strictly between 0 and 1"),
            **self.on_policy_ranges(),
        }
        if not (self.alpha or self.features):  # generated rows have no cross-entropy to learn from
            why = "0 with alpha 0, since generated rows have the divergence only"
            ranges |= {n: (not getattr(self, n), why) for n in ("on_policy", "on_policy_raise")}
        for name, (fits, allowed) in ranges.items():
            if not fits:
                raise InputError(f"{name} is {getattr(self, name)}, but must be {allowed}")


def _settings_named_by(given: Any) -> Collection[str]:
    """The settings in an `accelerator_config`: an object, a dictionary, JSON or its file."""
    if given is None:
        return ()
    if isinstance(given, str | Path):
        text = str(given)
        given = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text())
    return given if isinstance(given, Mapping) else vars(given)
