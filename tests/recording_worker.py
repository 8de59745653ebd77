"""Two processes record and train from it: `recording_worker.py OUT live|recorded`."""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from distributed import leave
from trainer_setup import arguments, make_rows, small_model, weights

from hf_distill import DistillationTrainer, record
from hf_distill.data import Collator

if __name__ == "__main__":
    folder, how = Path(sys.argv[1]), sys.argv[2]
    rows, collate = Dataset.from_list(make_rows(20, 0)), Collator(1, 0)
    teacher = small_model(1)
    if how == "recorded":
        rows = record(rows, teacher, folder / "r", kind="full", data_collator=collate, shard_rows=3)
    args = arguments(
        folder / how, max_steps=20, learning_rate=1e-2, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, use_cpu=True, ddp_find_unused_parameters=False,
    )  # fmt: skip
    trainer = DistillationTrainer(
        small_model(0),
        teacher if how == "live" else None,
        args,
        train_dataset=rows,
        data_collator=collate,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if trainer.is_world_process_zero():
        torch.save(weights(trainer), folder / f"{how}.pt")
        (folder / f"{how}.json").write_text(json.dumps(losses))
    leave()
