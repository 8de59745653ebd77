"""Publish checkpoints during training, and collect the facts of the model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from hf_distill.reporting.model_card import CardFacts, metrics_of_evaluation
from hf_distill.training.feature_settings import features_named
from hf_distill.training.on_policy.arguments import given_settings

PICKLED = ["*.bin", "*.pt", "*.pth", "*.pkl"]
ONLY_TO_RESUME = ["global_step*", "latest", "trainer_state.json", "zero_to_fp32.py"]


def push_checkpoint(trainer: Any, folder: str) -> None:
    """Publish a checkpoint's model while training goes on, without anything pickled."""
    args, pending = trainer.args, trainer.push_in_progress
    if not trainer.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
        return
    if pending is not None and not pending.is_done() and not args.hub_always_push:
        return
    trainer._finish_current_push()
    job: Any = HfApi().upload_folder(
        repo_id=trainer.hub_model_id,
        folder_path=folder,
        commit_message=f"Training in progress, step {trainer.state.global_step}",
        token=args.hub_token,
        run_as_future=True,
        ignore_patterns=PICKLED + ONLY_TO_RESUME,
        revision=args.hub_revision,
    )
    trainer.push_in_progress = PushInProgress()
    trainer.push_in_progress.jobs.append(job)


def card_facts(
    trainer: Any,
    *,
    language: str | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    dataset: str | list[str] | None = None,
    **_: Any,
) -> CardFacts:
    """The facts of a trainer's model card: teacher, objective, and the last evaluation."""
    args, config, folder = trainer.args, trainer.model.config, trainer.args.output_dir
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    return CardFacts(
        model_name=model_name or Path(folder).absolute().name,
        teacher=trainer.teacher.name if trainer.teacher is not None else None,
        initial_from=finetuned_from or getattr(config, "name_or_path", None) or None,
        dataset=dataset,
        objective={
            "alpha": args.alpha,
            "temperature": args.temperature,
            "divergence": args.divergence,
            "features": features_named(args.features),
            **given_settings(vars(args)),
        },
        metrics=metrics_of_evaluation(evaluated[-1]) if evaluated else None,
        training={
            "steps": trainer.state.global_step,
            "learning rate": args.learning_rate,
            "rows per step": trainer.get_total_train_batch_size(args),
            "seed": args.seed,
        },
        versions={"transformers": transformers.__version__, "torch": torch.__version__},
        tags=[tags] if isinstance(tags, str) else tags or (),
        language=language,
        license=license,
        repo_id=trainer.hub_model_id,
        adapter=hasattr(trainer.model, "peft_config"),
        task=trainer._loss.task.key,
    )
