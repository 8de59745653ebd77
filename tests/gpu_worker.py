"""Some steps on one device under an engine of accelerate; the weights that come of it.

    gpu_worker.py FOLDER ENGINE CASE

ENGINE: ddp, fsdp2, zero2 or zero3; CASE: see `engine_worker`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from distributed import leave
from engine_worker import make_trainer

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2}},
    **{
        f"zero{stage}": {
            "deepspeed": {
                "zero_optimization": {
                    "stage": stage,
                    "stage3_gather_16bit_weights_on_model_save": True,
                },
                "zero_allow_untested_optimizer": True,
                "train_batch_size": "auto",
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
            }
        }
        for stage in (2, 3)
    },
}


def run(folder: Path, engine: str, case: str) -> None:
    on_cpu = os.environ.get("HF_DISTILL_GPU_DRY") == "1"
    trainer = make_trainer(folder, case, processes=1, use_cpu=on_cpu, **ENGINES[engine])
    trainer.train()
    wrapped: Any = trainer.model_wrapped
    kinds = {"ddp": "DistributedDataParallel", "fsdp2": "FSDP"}
    if engine in kinds:
        assert type(wrapped).__name__.startswith(kinds[engine]), type(wrapped)
    else:
        assert wrapped.zero_optimization_stage() == int(engine[-1])
    assert trainer._loss.student.fused
    state = trainer.accelerator.get_state_dict(wrapped)
    torch.save({name: value.float().cpu() for name, value in state.items()}, folder / "weights.pt")


if __name__ == "__main__":
    run(Path(sys.argv[1]), *sys.argv[2:])
    leave()
