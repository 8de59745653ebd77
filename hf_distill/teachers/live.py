"""A live teacher: a model in the same process, frozen, in eval mode, run batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.losses.signals import Signal
from hf_distill.losses.targets import Targets
from hf_distill.models.base import base_model
from hf_distill.models.engines import compiled
from hf_distill.models.loading import local_tokenizer
from hf_distill.tasks import Task, find_task
from hf_distill.teachers.placement import check_placement, place


class LiveTeacher:
    """A model in this process as a teacher.

    Its dtype, attention implementation and quantisation stay as loaded.
    task: its key, by default that of the model's class
    whole_logits: compute whole logits instead of returning the inputs of the output head
    placement: "auto", "replicated", "sharded" or "offloaded"; see docs/scaling.md
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        task: str | None = None,
        whole_logits: bool = False,
        placement: str = "auto",
    ) -> None:
        check_placement(placement)
        self._set_up(model, tokenizer, task, whole_logits=whole_logits)
        self.model.requires_grad_(False).eval()
        self._placement = placement
        self._where: str | None = None

    def _set_up(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase | None,
        task: str | None,
        *,
        whole_logits: bool,
        adapter: str | None = None,
    ) -> None:
        """adapter: see `models.output_head.HeadReplacement`"""
        self.model = model
        plain = base_model(model)
        self.name = plain.config.name_or_path or type(plain).__name__
        role = f"teacher {self.name!r}"
        self.task: Task = find_task(model, "teacher", task)
        self.runner = self.task.runner(model, role, fused=not whole_logits, adapter=adapter)
        self.rows = self.runner.outcomes
        self.tokenizer = tokenizer or local_tokenizer(plain.config.name_or_path)
        self.reads = self.runner.embedding_rows
        self.together = False
        self._compiled = model  # until it is compiled

    def prepare(self, accelerator: Accelerator, *, student_reads: int) -> None:
        """Place the weights, log where, and follow the accelerator's mixed precision."""
        if self._where is None:
            self._where = place(self.model, self._placement, accelerator)
            self.together = self._where.startswith("sharded")
            accelerator.print(f"teacher: {Path(self.name).name}, {self._where}")
            if self._where.startswith("replicated"):
                self._compiled = compiled(self.model, accelerator)
        self._follow(accelerator, student_reads)

    def _follow(self, accelerator: Accelerator, student_reads: int) -> None:
        self.runner.autocast = accelerator.autocast
        self.runner.may_meet_unknown_ids = student_reads > self.reads

    @torch.no_grad()
    def signal(self, inputs: Mapping[str, Any], targets: Targets) -> Signal:
        """The inputs of its output head at the targets; logits where the head is not supported."""
        with self.active():
            return self.runner.signal(inputs, targets, self._compiled)

    @contextmanager
    def active(self) -> Iterator[None]:
        """A context in which the model gives the teacher's distributions."""
        # At each step: a wrapper's .train() elsewhere would switch dropout on again.
        self.model.eval()
        yield
