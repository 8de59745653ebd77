"""The settings of on-policy rows, a part of `DistillationArguments`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from hf_distill.losses.divergences import DIVERGENCES

# Further losses on the student's own text (`losses.policy_gradient`): by single sampled tokens, and
# MiniLLM's, in which the weight of a token depends on the tokens after it.
DRAWN, SEQUENCE = "drawn_token", "sequence_reverse_kl"
# The backends that generate text (`on_policy.backends`).
WRITING_BACKENDS = ("generate", "vllm")

# Settings that ask for something, which is not done while on_policy is 0.
_ONLY_WITH_ROWS = ("on_policy_warmup", "on_policy_divergence", "teacher_mix", "replay", "keep_rows")
_OF_THE_ROWS = (
    "on_policy", "on_policy_warmup", "on_policy_raise", "on_policy_divergence", "teacher_mix",
    "sampling_temperature", "top_p", "top_k", "max_new_tokens", "replay",
)  # fmt: skip


@dataclass
class OnPolicyArguments(TrainingArguments):
    """See `DistillationArguments`, which checks the values."""

    on_policy: float = field(
        default=0.0,
        metadata={
            "help": "Share of the rows, 0 to 1, whose completions the student generates in each "
            "step. They have the divergence from a live teacher and no cross-entropy."
        },
    )
    on_policy_warmup: float = field(
        default=0.0,
        metadata={
            "help": "Steps over which on_policy rises linearly from 0; a value below 1 is a share "
            "of all steps."
        },
    )
    on_policy_raise: float = field(
        default=0.0,
        metadata={
            "help": "Added to the share of on-policy rows, up to 1, at each evaluation with a "
            "higher loss than the previous one."
        },
    )
    on_policy_divergence: str | None = field(
        default=None,
        metadata={
            "help": "Divergence on the student's own text, by default that of the other rows; "
            f"also {DRAWN}, the reverse KL estimated from each sampled token, and "
            f"{SEQUENCE}, the reverse KL of whole texts (MiniLLM)."
        },
    )
    teacher_mix: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the teacher, 0 to below 1, in the mixture of distributions that the "
            "student's own text is sampled from."
        },
    )
    sampling_temperature: float = field(
        default=1.0,
        metadata={"help": "Temperature at which the student generates text; 0 is greedy."},
    )
    top_p: float = field(
        default=1.0,
        metadata={
            "help": "The student samples from the most likely tokens with this total probability."
        },
    )
    top_k: int = field(
        default=0,
        metadata={"help": "The student samples from this many most likely tokens; 0: all."},
    )
    max_new_tokens: int = field(
        default=128, metadata={"help": "Most tokens that the student generates for a row."}
    )
    prompt_tokens: int = field(
        default=32,
        metadata={
            "help": "Length of the prompt in rows without a prompt of their own (plain text)."
        },
    )
    keep_rows: bool = field(
        default=False,
        metadata={
            "help": "Save the rows that the student generates in output_dir, for "
            "hf_distill.written_rows."
        },
    )
    replay: float = field(
        default=0.0,
        metadata={
            "help": "Share of the generated rows, 0 to 1, that reuse a text of an earlier step "
            "instead."
        },
    )
    writing_backend: str = field(
        default="generate",
        metadata={"help": f"What generates the student's text: {' or '.join(WRITING_BACKENDS)}."},
    )
    vllm_memory: float = field(
        default=0.3,
        metadata={"help": "Share of the device's memory that vLLM takes, 0 to 1."},
    )
    vllm_server: str | None = field(
        default=None,
        metadata={
            "help": "Address of a vLLM server that generates, such as http://localhost:8000; by "
            "default an engine in the training's own processes."
        },
    )
    sample_steps: int = field(
        default=50,
        metadata={"help": "Steps between sample texts in the log history; 0 for none."},
    )

    @staticmethod
    def names() -> set[str]:
        """The names of these settings."""
        every, of_trainer = (fields(kind) for kind in (OnPolicyArguments, TrainingArguments))
        return {field.name for field in every} - {field.name for field in of_trainer}

    def _range_of_backend(self) -> tuple[bool, str]:
        known = self.writing_backend in WRITING_BACKENDS
        if known and self.vllm_server is not None:
            needed = "vllm with a vllm_server: set writing_backend to vllm"
            return self.writing_backend == "vllm", needed
        return known, f"one of {', '.join(WRITING_BACKENDS)}"

    def on_policy_ranges(self) -> dict[str, tuple[bool, str]]:
        """Whether each value is within its range, and the range in words."""
        return {
            "on_policy": (0 <= self.on_policy <= 1, "between 0 and 1"),
            "on_policy_warmup": (0 <= self.on_policy_warmup < float("inf"), "at least 0"),
            "on_policy_raise": (0 <= self.on_policy_raise <= 1, "between 0 and 1"),
            "sample_steps": (self.sample_steps >= 0, "at least 0"),
            "replay": (0 <= self.replay <= 1, "between 0 and 1"),
            "on_policy_divergence": (
                self.on_policy_divergence in (None, DRAWN, SEQUENCE, *DIVERGENCES),
                f"one of {', '.join((*DIVERGENCES, DRAWN, SEQUENCE))}",
            ),
            "teacher_mix": (0 <= self.teacher_mix < 1, "at least 0, below 1"),
            "vllm_memory": (0 < self.vllm_memory < 1, "above 0 and below 1"),
            "vllm_server": (
                self.vllm_server is None or self.vllm_server.startswith(("http://", "https://")),
                "an address, such as http://localhost:8000",
            ),
            "writing_backend": self._range_of_backend(),
            "sampling_temperature": (self.sampling_temperature >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "top_k": (self.top_k >= 0, "at least 0"),
            **self._ranges_of_draws(),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "prompt_tokens": (self.prompt_tokens >= 1, "at least 1"),
        }

    def _ranges_of_draws(self) -> dict[str, tuple[bool, str]]:
        """The values required by losses that are correct only for unrestricted sampling."""
        if self.on_policy_divergence in (DRAWN, SEQUENCE):
            cause = f"with on_policy_divergence {self.on_policy_divergence!r}"
        elif self.teacher_mix:
            cause = "with teacher_mix"
        else:
            return {}
        needed = {"sampling_temperature": 1, "top_p": 1, "top_k": 0, "replay": 0, "temperature": 1}
        return {
            name: (getattr(self, name) == value, f"{value} {cause}")
            for name, value in needed.items()
        }


def given_settings(train: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, by name, that decide which rows are generated and what is learnt from them.

    train: values of `OnPolicyArguments` by name; those that are left out have their default
    returns: the share, the length, and what is not the default; {} where nothing is generated
    """
    values = {**_defaults(), **train}
    if not (values["on_policy"] or values["on_policy_raise"]):
        return {}
    given = _not_default(values)
    always = ("on_policy", "max_new_tokens")
    return {name: values[name] for name in _OF_THE_ROWS if name in always or name in given}


def without_effect(train: Mapping[str, Any]) -> list[str]:
    """The names of settings that were given although the student never generates rows."""
    values = {**_defaults(), **train}
    if values["on_policy"] or values["on_policy_raise"]:
        return []
    given = _not_default(values)
    return [name for name in _ONLY_WITH_ROWS if name in given]


def _defaults() -> dict[str, Any]:
    names = OnPolicyArguments.names()
    return {f.name: f.default for f in fields(OnPolicyArguments) if f.name in names}


def _not_default(values: Mapping[str, Any]) -> set[str]:
    return {name for name, default in _defaults().items() if values[name] != default}
