"""Backends that write the student's text, behind one interface.

make_backend          the one that the arguments name
Backend               the interface; `Prompt` goes in, `Written` comes out
"""

from __future__ import annotations

from typing import Any

from hf_distill.training.on_policy.backends.base import Backend, Prompt, Written
from hf_distill.training.on_policy.backends.generate import GenerateBackend
from hf_distill.training.on_policy.backends.vllm import VllmBackend
from hf_distill.training.on_policy.backends.vllm_server import VllmServerBackend

__all__ = ["Backend", "Prompt", "Written", "make_backend"]


def make_backend(trainer: Any, pad_token_id: int) -> Backend:
    """The backend for a `DistillationTrainer`. pad_token_id: what it pads is masked"""
    if trainer.args.writing_backend == "vllm":
        return (VllmServerBackend if trainer.args.vllm_server else VllmBackend)(trainer)
    return GenerateBackend(trainer, pad_token_id)
