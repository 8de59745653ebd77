"""A teacher that shares the student's weights: its base model, or another adapter on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from hf_distill.errors import InputError
from hf_distill.teachers.live import LiveTeacher


class AdapterTeacher(LiveTeacher):
    """A `peft` model as its own teacher: without its adapter, or with another one.

    model: the student; in `evaluate_student`, any `peft` model
    adapter: the name of the teaching adapter; None for the base model without any
    tokenizer: the student's, which is also the teacher's
    raises: InputError for an adapter that the model does not have, or that is being trained
    """

    def __init__(
        self,
        model: PeftModel,
        adapter: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        task: str | None = None,
        whole_logits: bool = False,
    ) -> None:
        if not isinstance(model, PeftModel):
            raise InputError(
                f"a {type(model).__name__} has no adapter to switch off, so it cannot be its own "
                "teacher: give a peft model (peft.get_peft_model), or another teacher"
            )
        if adapter is not None and adapter not in model.peft_config:
            known = ", ".join(map(repr, model.peft_config))
            raise InputError(
                f"the student has no adapter {adapter!r}, only {known}: load it with "
                "model.load_adapter(path, adapter_name=...)"
            )
        if adapter is not None and adapter in model.active_adapters:
            raise InputError(
                f"adapter {adapter!r} is the one being trained, so the divergence would be 0: name "
                "another adapter, or None for the base model"
            )
        self.adapter = adapter
        # "" stands for no adapter: which head is replaced depends on it.
        self._set_up(model, tokenizer, task, whole_logits=whole_logits, adapter=adapter or "")
        self.name = f"{self.name} ({f'adapter {adapter}' if adapter else 'adapter off'})"

    def prepare(self, accelerator: Accelerator, *, student_reads: int) -> None:
        """Log the teacher. No weights move, since the student's engine holds them."""
        accelerator.print(f"teacher: {self.name}, the student's own weights")
        self._follow(accelerator, student_reads)

    @contextmanager
    def active(self) -> Iterator[None]:
        """A context with the teacher's adapter active, or none; restores the student's afterwards.

        Adapters, modes and gradient flags are restored. The tuner lists all active adapters; the
        `peft` model lists only one.
        """
        model = self.model
        training, active, current = model.training, model.active_adapters, model.active_adapter
        # peft changes these flags when it switches adapters, and would unfreeze frozen weights.
        flags = [(p, p.requires_grad) for p in model.parameters()]
        try:
            with super().active():
                if self.adapter is None:
                    with model.disable_adapter():
                        yield
                else:
                    model.set_adapter(self.adapter, inference_mode=True)
                    yield
        finally:
            if self.adapter is not None:
                model.set_adapter(current)
                model.base_model.set_adapter(list(active))
            model.train(training)
            with torch.no_grad():
                for parameter, flag in flags:
                    parameter.requires_grad_(flag)
