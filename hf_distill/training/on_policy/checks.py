"""Check that a trainer and its rows support on-policy rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.distributed.fsdp import FullyShardedDataParallel

from hf_distill.data import TEACHER_PROMPT_IDS
from hf_distill.errors import InputError
from hf_distill.models.base import base_model
from hf_distill.tasks import CausalLM, Seq2SeqLM
from hf_distill.teachers import LiveTeacher
from hf_distill.training.on_policy.rows import KNOWN


def check(trainer: Any, batch: Mapping[str, Any]) -> None:
    """InputError for a trainer or rows that do not support on-policy rows.

    trainer: a `DistillationTrainer`; batch: one of those of a step
    """
    names = set(batch)
    if not isinstance(trainer._loss.task, CausalLM | Seq2SeqLM):
        raise InputError(
            f"on_policy needs a student that generates text, not {trainer._loss.task.name}: set it "
            "to 0"
        )
    if trainer.args.on_policy_raise and trainer.args.eval_strategy == "no":
        raise InputError(
            "on_policy_raise follows the loss of evaluations, but eval_strategy is 'no': set "
            "it to 'steps' or 'epoch', or on_policy_raise to 0"
        )
    if trainer.teacher is None:
        beside = ", beside the recordings of the data rows" if trainer._recorded else ""
        raise InputError(
            "on_policy needs a live teacher for the text that the student generates: pass teacher="
            f"{beside}"
        )
    if trainer.args.teacher_mix:
        _check_mixture(trainer, names)
    if isinstance(trainer.model_wrapped, FullyShardedDataParallel):
        raise InputError(
            "on_policy cannot gather the weights of FSDP version 1: set fsdp_version to 2"
        )
    if (getattr(base_model(trainer.model), "tp_size", None) or 1) > 1:
        raise InputError(
            "on_policy does not support tensor parallelism: use DDP, ZeRO or FSDP2 for the student"
        )
    if TEACHER_PROMPT_IDS in names and (trainer._recorded is not None or trainer.args.replay):
        raise InputError(
            "a prompt of the teacher's own (teacher_prompt or teacher_prompt_ids) needs a live "
            "teacher for each row and its own prompt: leave out recordings and replay"
        )
    if "position_ids" in names:
        raise InputError("on_policy needs one document a row: set packing to False")
    if further := sorted(names - KNOWN):
        raise InputError(
            f"on_policy replaces rows and cannot make the column {further[0]!r}: leave it out"
        )
    if batch.get("labels") is None:
        raise InputError(
            "on_policy needs labels, since the prompt ends before the first one: add labels"
        )


def _check_mixture(trainer: Any, names: set[str]) -> None:
    """InputError if the teacher cannot be mixed into the sampling distribution."""
    teacher = trainer.teacher
    if trainer.args.writing_backend != "generate":
        raise InputError(
            f"teacher_mix runs the teacher at every generated token, which writing_backend "
            f"{trainer.args.writing_backend!r} does not support: set it to 'generate'"
        )
    if isinstance(trainer._loss.task, Seq2SeqLM):
        raise InputError("teacher_mix is for causal models: set it to 0 for an encoder-decoder")
    if not isinstance(teacher, LiveTeacher) or teacher.together:
        what = "in shards" if isinstance(teacher, LiveTeacher) else f"a {type(teacher).__name__}"
        raise InputError(
            "teacher_mix needs a teacher that is a model, whole on each process, but this one is "
            f"{what}: set teacher_mix to 0, or give the model with teacher_placement='replicated'"
        )
    if TEACHER_PROMPT_IDS in names:
        raise InputError(
            f"teacher_mix lets the teacher continue the student's prompt, but the rows have "
            f"{TEACHER_PROMPT_IDS}: leave out one of them"
        )
