"""Training: arguments, the trainers, checkpoints."""

from hf_distill.training.arguments import DistillationArguments
from hf_distill.training.on_policy import written_rows
from hf_distill.training.seq2seq import Seq2SeqDistillationArguments, Seq2SeqDistillationTrainer
from hf_distill.training.trainer import DistillationTrainer

__all__ = [
    "DistillationArguments",
    "DistillationTrainer",
    "Seq2SeqDistillationArguments",
    "Seq2SeqDistillationTrainer",
    "written_rows",
]
