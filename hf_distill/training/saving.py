"""Save, restore and publish a trainer's model and state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer

from hf_distill.errors import InputError
from hf_distill.reporting.model_card import write_card
from hf_distill.training import artifacts
from hf_distill.training.arguments import DistillationArguments
from hf_distill.training.loss import DistillationLoss


class SavingMixin(Trainer):
    """A Trainer with atomic checkpoints and without pickled files among the published ones."""

    args: DistillationArguments
    _loss: DistillationLoss

    # A barrier before the last file of a checkpoint, `trainer_state.json`: if it exists, every
    # process has finished its part.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's, with the barrier where a checkpoint holds the model only."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and self.args.save_only_model:
            self.accelerator.wait_for_everyone()

    def _save_rng_state(self, output_dir: str) -> None:
        """As Trainer's, with the barrier."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """As Trainer's, without its arguments as a pickle, which nothing ever reads back."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            Path(output_dir or str(self.args.output_dir), "training_args.bin").unlink(True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As Trainer's, which would publish pickles."""
        artifacts.push_checkpoint(self, checkpoint_folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's, with teacher, objective, and what was last evaluated."""
        if self.is_world_process_zero():
            write_card(str(self.args.output_dir), artifacts.card_facts(self, *args, **kwargs))

    # ---- The projections of feature losses, which are no part of a saved student ----

    # DeepSpeed's and FSDP's own checkpoints hold every trained weight.

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As Trainer's, with the projections."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            self._loss.features.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As Trainer's, with the projections."""
        if checkpoint and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            self._loss.features.load(checkpoint)
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            if "loaded state dict" not in str(error):  # torch's words for another set of weights
                raise
            raise InputError(
                f"the optimizer of checkpoint {checkpoint!r} was saved for other weights: features "
                "or the student differ from those of the checkpoint: resume with the same ones, or "
                "train without resume_from_checkpoint"
            ) from error
