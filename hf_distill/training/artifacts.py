"""What a training leaves behind: whole checkpoints, nothing pickled in public, an honest card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi
from transformers import Trainer
from transformers.trainer_utils import HubStrategy, TrainOutput
from transformers.utils.hub import PushInProgress

from hf_distill.errors import InputError, warn_once
from hf_distill.reporting.model_card import CardFacts, metrics_of_evaluation, write_card
from hf_distill.training.arguments import DistillationArguments
from hf_distill.training.checkpoints import is_complete, last_complete_checkpoint

PICKLED = ["*.bin", "*.pt", "*.pth", "*.pkl"]
ONLY_TO_RESUME = ["global_step*", "latest", "trainer_state.json", "zero_to_fp32.py"]


class ArtifactsMixin(Trainer):
    """The part of `DistillationTrainer` that writes, resumes and publishes."""

    args: DistillationArguments
    model: Any
    teacher: Any
    hub_model_id: Any
    push_in_progress: Any

    @property
    def folder(self) -> str:
        """Where this training writes; Trainer's type leaves it open, its post-init does not."""
        return self.args.output_dir or "trainer_output"

    def _save_rng_state(self, output_dir: str) -> None:
        """The last thing that every rank writes; `trainer_state.json` follows on the first one.

        With a barrier between, a readable `trainer_state.json` says that the whole checkpoint is
        there, which is how an interrupted one is told apart (`last_complete_checkpoint`).
        """
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Trainer's `train`; resumes from whole checkpoints only."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.folder)
            if resume_from_checkpoint is None:
                raise InputError(
                    f"there is no complete checkpoint in {self.folder!r} to resume from: "
                    "train without resume_from_checkpoint"
                )
        elif resume_from_checkpoint and not is_complete(Path(resume_from_checkpoint)):
            raise InputError(
                f"checkpoint {str(resume_from_checkpoint)!r} is missing or was interrupted while "
                "being written (no readable trainer_state.json): resume from an earlier one"
            )
        if resume_from_checkpoint:
            self._check_engine(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_engine(self, checkpoint: Path) -> None:
        """Say, or refuse, what cannot be taken over from another engine's checkpoint."""
        theirs, ours = any(checkpoint.glob("global_step*")), self.is_deepspeed_enabled
        if ours and not theirs:
            raise InputError(
                f"checkpoint {str(checkpoint)!r} was not written under DeepSpeed, which cannot "
                "read it: go on as it was started, or give that folder as the model"
            )
        if theirs and not ours:
            if not list(checkpoint.glob("*.safetensors")):
                raise InputError(
                    f"checkpoint {str(checkpoint)!r} has its weights in DeepSpeed's shards only: "
                    "go on under DeepSpeed, or write them out with its zero_to_fp32.py "
                    "(zero3_save_16bit_model: true in accelerate's configuration saves them whole)"
                )
            warn_once(
                "%s was written under DeepSpeed: its weights are used, and the optimizer begins "
                "afresh.",
                checkpoint,
            )

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """Trainer's files, without its arguments as a pickle, which nothing ever reads back."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir if output_dir is not None else self.folder)
            (folder / "training_args.bin").unlink(missing_ok=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Publish a checkpoint's model while training goes on; Trainer would add its pickles."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self._finish_current_push()
        job: Any = HfApi().upload_folder(
            repo_id=self.hub_model_id,
            folder_path=checkpoint_folder,
            commit_message=f"Training in progress, step {self.state.global_step}",
            token=self.args.hub_token,
            run_as_future=True,
            ignore_patterns=PICKLED + ONLY_TO_RESUME,
            revision=self.args.hub_revision,
        )
        self.push_in_progress = PushInProgress()
        self.push_in_progress.jobs.append(job)

    def create_model_card(  # type: ignore[override]  # Trainer's other arguments are left to **_
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        dataset: str | list[str] | None = None,
        **_: Any,
    ) -> None:
        """Write a card into the output folder: teacher, objective, and what was last evaluated."""
        if not self.is_world_process_zero():
            return
        args, config = self.args, self.model.config
        evaluated = [entry for entry in self.state.log_history if "eval_ce" in entry]
        facts = CardFacts(
            model_name=model_name or Path(self.folder).absolute().name,
            teacher=self.teacher.name if self.teacher is not None else None,
            initial_from=finetuned_from or getattr(config, "name_or_path", None) or None,
            dataset=dataset,
            objective={
                "alpha": args.alpha,
                "temperature": args.temperature,
                "divergence": args.divergence,
            },
            metrics=metrics_of_evaluation(evaluated[-1]) if evaluated else None,
            training={
                "steps": self.state.global_step,
                "learning rate": args.learning_rate,
                "rows per step": self.get_total_train_batch_size(args),
                "seed": args.seed,
            },
            versions={"transformers": transformers.__version__, "torch": torch.__version__},
            tags=[tags] if isinstance(tags, str) else tags or (),
            language=language,
            license=license,
            repo_id=self.hub_model_id,
            adapter=hasattr(self.model, "peft_config"),
        )
        write_card(self.folder, facts)
