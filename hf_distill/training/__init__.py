"""Training: arguments, the trainer, checkpoints."""

from hf_distill.training.arguments import DistillationArguments
from hf_distill.training.trainer import DistillationTrainer

__all__ = ["DistillationArguments", "DistillationTrainer"]
