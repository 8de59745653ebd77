"""Two steps under DeepSpeed, and what shows that its ZeRO is on: `zero_worker.py FOLDER STAGE`."""

import json
import sys
from pathlib import Path

import torch
from trainer_setup import arguments, collate, make_rows, small_model

from hf_distill import DistillationTrainer

if __name__ == "__main__":
    folder, stage = Path(sys.argv[1]), int(sys.argv[2])
    trainer = DistillationTrainer(
        small_model(0),
        small_model(1),
        arguments(folder, max_steps=2, save_strategy="steps", save_steps=2),
        train_dataset=make_rows(16, 0),
        data_collator=collate,
    )
    trainer.train()
    engine = trainer.model_wrapped
    assert engine.zero_optimization_stage() == stage, engine.zero_optimization_stage()
    whole = sum(parameter.numel() for parameter in trainer.model.parameters())
    held = sum(part.numel() for part in engine.optimizer.single_partition_of_fp32_groups)
    # Each process keeps the optimizer's float32 copy of its own half, up to padding.
    assert held <= whole // 2 + 64, (held, whole)
    if trainer.is_world_process_zero():
        shards = sorted(path.name for path in folder.glob("checkpoint-2/global_step*/*optim*"))
        found = {"world": torch.distributed.get_world_size(), "shards": shards}
        (folder / "found.json").write_text(json.dumps(found))
    trainer.accelerator.end_training()
