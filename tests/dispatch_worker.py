"""Train with and without `dispatch_batches` on the processes of this launch: `... OUT`."""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from distributed import leave
from trainer_setup import arguments, collate, make_rows, small_model, weights

from hf_distill import DistillationTrainer


def train(folder: Path, dispatch: bool) -> dict[str, torch.Tensor]:
    settings = {"accelerator_config": {"dispatch_batches": dispatch}, "learning_rate": 1e-2}
    trainer = DistillationTrainer(
        small_model(0),
        small_model(1),
        arguments(folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, **settings),
        train_dataset=Dataset.from_list(make_rows(24, seed=1)).to_iterable_dataset(),
        # Batches that are joined must have one width.
        data_collator=partial(collate, length=12),
    )
    trainer.train()
    return weights(trainer)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        joined, apart = (train(Path(folder), dispatch) for dispatch in (True, False))
    error = max(float((joined[name] - apart[name]).abs().max()) for name in joined)
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(error))
    leave()
