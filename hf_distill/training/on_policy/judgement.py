"""Figures of the student's newest texts under student and teacher, for the log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from hf_distill.losses.targets import total_counts
from hf_distill.tasks import Seq2SeqLM
from hf_distill.training.loss import step_counts
from hf_distill.training.on_policy.rows import Row, batch_of
from hf_distill.training.on_policy.texts import Text


@torch.no_grad()
def judgement(trainer: Any, texts: Sequence[Text], pad_token_id: int) -> dict[str, float]:
    """Figures of some texts, by their names in the log; means over their tokens.

    written_log_prob, written_teacher_log_prob: log-probability of a token under student and
        teacher, in nats
    written_agreement: share of positions where both have the same most likely token
    texts: the newest of all processes, so that each computes the same figures, and all run a
        sharded teacher together
    """
    encoder_decoder = isinstance(trainer._loss.task, Seq2SeqLM)
    rows = [
        Row(list(text.prompt), [], list(text.prompt), completion=list(text.completion))
        for text in texts
    ]
    batch = batch_of(rows, pad_token_id, encoder_decoder=encoder_decoder)
    batch = {name: tensor.to(trainer.args.device) for name, tensor in batch.items()}
    counts = step_counts(total_counts([trainer._loss.task.counts(batch)]))
    objective = replace(trainer.current_objective(), temperature=1.0)
    model, modes = trainer.model, [(m, m.training) for m in trainer.model.modules()]
    model.eval()
    try:
        with trainer.compute_loss_context_manager():
            found = trainer._loss(model, batch, objective, counts).per_target
    finally:
        for module, training in modes:
            module.training = training
    names = {
        "written_log_prob": ("ce", -1.0),
        "written_teacher_log_prob": ("teacher_ce", -1.0),
        "written_agreement": ("top1_agreement", 1.0),
    }
    return {
        name: sign * found[key][0].mean().item()
        for name, (key, sign) in names.items()
        if key in found
    }
