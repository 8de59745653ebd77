"""Some steps under DeepSpeed, and what shows that its ZeRO is on: `zero_worker.py FOLDER STAGE`."""

import json
import sys
from pathlib import Path

import torch
from distributed import leave
from trainer_setup import arguments, collate, make_rows, small_model

from hf_distill import DistillationTrainer

STEPS = 4


def make_trainer(folder: Path, rows_a_step: int) -> DistillationTrainer:
    """The same for one process and for several: equal batches, unequal numbers of targets."""
    return DistillationTrainer(
        small_model(0),
        small_model(1),
        arguments(
            folder,
            max_steps=STEPS,
            temperature=2.0,
            per_device_train_batch_size=rows_a_step,
            train_sampling_strategy="sequential",
            save_strategy="steps",
            save_steps=STEPS,
            max_grad_norm=0.0,
            learning_rate=1e-3,
        ),
        train_dataset=make_rows(32, 0),
        data_collator=collate,
    )


def check_partition(engine: torch.nn.Module, stage: int, whole: int) -> None:
    """Each process keeps the optimizer's float32 copy of its own half, up to padding."""
    assert engine.zero_optimization_stage() == stage, engine.zero_optimization_stage()
    optimizer = engine.optimizer
    parts = (
        optimizer.single_partition_of_fp32_groups
        if stage < 3
        else optimizer.fp32_partitioned_groups_flat
    )
    held = sum(part.numel() for part in parts)
    assert held <= whole // 2 + 64, (held, whole)


if __name__ == "__main__":
    folder, stage = Path(sys.argv[1]), int(sys.argv[2])
    trainer = make_trainer(folder, rows_a_step=4)
    whole = sum(parameter.numel() for parameter in trainer.model.parameters())
    fused = trainer._stand_in is not None
    trainer.train()
    fused = fused and trainer._stand_in is not None
    check_partition(trainer.model_wrapped, stage, whole)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        torch.save({name: value.cpu() for name, value in weights.items()}, folder / "weights.pt")
        shards = sorted(path.name for path in folder.glob("checkpoint-*/global_step*/*optim*"))
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found = {"world": torch.distributed.get_world_size(), "shards": shards}
        found |= {"stage": stage, "fused": fused, "losses": losses}
        (folder / "found.json").write_text(json.dumps(found))
    leave()
