"""Train with feature losses on each process: `feature_worker.py FOLDER NAME FEATURES`."""

import json
import sys
from pathlib import Path

import torch
from distributed import leave
from feature_setup import pair, trainer_of
from safetensors.torch import save_file

from hf_distill.training.features import PROJECTIONS

if __name__ == "__main__":
    folder, name, features = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = trainer_of(name, folder, features, pair(name), max_steps=2, **batches)
    trainer.train()
    if torch.distributed.get_rank() == 0:
        projections = trainer._loss.features.projections.state_dict()
        found = {f"{PROJECTIONS}.{key}": value for key, value in projections.items()}
        save_file({**trainer.model.state_dict(), **found}, folder / "found.safetensors")
    leave()
