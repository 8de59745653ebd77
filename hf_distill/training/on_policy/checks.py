"""Which trainers and rows allow a student to write."""

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
    """InputError for what the student cannot write on.

    trainer: a `DistillationTrainer`; batch: one of those of a step
    """
    names = set(batch)
    if not isinstance(trainer._loss.task, CausalLM | Seq2SeqLM):
        raise InputError(f"on_policy needs a student that writes, not {trainer._loss.task.name}")
    if trainer.args.on_policy_raise and trainer.args.eval_strategy == "no":
        raise InputError(
            "on_policy_raise follows the loss of evaluations, but eval_strategy is 'no': set "
            "it to 'steps' or 'epoch', or on_policy_raise to 0"
        )
    if trainer.teacher is None:
        beside = ", beside the recordings of the data rows" if trainer._recorded else ""
        raise InputError(
            "on_policy needs a live teacher to judge what the student writes: pass teacher="
            f"{beside}"
        )
    if trainer.args.teacher_mix:
        _check_mixture(trainer, names)
    if isinstance(trainer.model_wrapped, FullyShardedDataParallel):
        raise InputError(
            "on_policy needs weights that it can gather, but fsdp_version is 1: set it to 2"
        )
    if (getattr(base_model(trainer.model), "tp_size", None) or 1) > 1:
        raise InputError(
            "on_policy cannot write with tensor parallelism: use DDP, ZeRO or FSDP2 for the student"
        )
    if TEACHER_PROMPT_IDS in names and (trainer._recorded is not None or trainer.args.replay):
        raise InputError(
            f"{TEACHER_PROMPT_IDS} needs a live teacher for each row and its own prompt: leave "
            "out recordings and replay"
        )
    if "position_ids" in names:
        raise InputError("on_policy needs one document a row: set packing to False")
    if further := sorted(names - KNOWN):
        raise InputError(
            f"on_policy makes rows anew and knows nothing of {further[0]!r}: leave out that column"
        )
    if batch.get("labels") is None:
        raise InputError("on_policy needs labels, before whose first the prompt stands")


def _check_mixture(trainer: Any, names: set[str]) -> None:
    """InputError where the teacher cannot have a share in each token that is drawn."""
    teacher = trainer.teacher
    if trainer.args.writing_backend != "generate":
        raise InputError(
            f"teacher_mix needs the student and the teacher to write together, but writing_backend "
            f"is {trainer.args.writing_backend!r}: set it to 'generate'"
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
