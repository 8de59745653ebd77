"""On-policy trainings on two processes: `on_policy_worker.py OUT ENGINE CASE...`.

ENGINE: ddp, zero2 or zero3 as accelerate's configuration says, or fsdp, which is torch's own
`fully_shard` around the trainer's loss, since accelerate leaves it out on CPUs.
CASE: of `CASES` in test_on_policy_rows.
"""

from __future__ import annotations

import json
import sys
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from distributed import TESTS, leave
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

sys.path.insert(0, str(TESTS / "training"))

from test_on_policy_rows import make_for_processes

from hf_distill.models.base import base_model


class ShardsAfterSteps(TrainerCallback):
    """Notes after each step whether ZeRO-3 has released weights."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        status = {getattr(p, "ds_status", None) for p in kwargs["model"].parameters()}
        self.seen.append("NOT_AVAILABLE" in {getattr(one, "name", "") for one in status})


def by_trainer(trainer: Any, engine: str) -> tuple[list[Any], dict[str, Tensor]]:
    if engine == "zero3":  # without it weights as small as these stay whole
        plugin = trainer.accelerator.state.deepspeed_plugin
        plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    shards = ShardsAfterSteps()
    trainer.add_callback(shards)
    trainer.train()
    wrapped = trainer.model_wrapped
    if engine.startswith("zero"):
        assert wrapped.zero_optimization_stage() == int(engine[-1])
        if engine == "zero3":
            assert shards.seen == [True] * trainer.args.max_steps
    else:
        assert type(wrapped).__name__ == "DistributedDataParallel"
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return logs, trainer.accelerator.get_state_dict(wrapped)


def by_fsdp(trainer: Any) -> tuple[list[Any], dict[str, Tensor]]:
    """Trainer's steps with `fully_shard` as the engine: the layers, and the rest."""
    model, mesh = trainer.model, init_device_mesh("cpu", (2,))
    for part in [*base_model(model).transformer.h, model]:
        fully_shard(part, mesh=mesh)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=trainer.args.learning_rate)
    trainer.state.max_steps = trainer.args.max_steps
    mine = trainer.accelerator.prepare_data_loader(trainer.get_train_dataloader())
    rows, logs = chain.from_iterable(repeat(mine)), []
    for _ in range(trainer.args.max_steps):
        model.train()
        batches, counts = trainer.get_batch_samples(rows, 1, trainer.args.device)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        assert model.training
        batch = trainer._prepare_inputs(batches[0])
        loss = trainer.compute_loss(model, batch, num_items_in_batch=counts)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        trainer.state.global_step += 1
        mean = trainer.accelerator.reduce(loss.detach(), "mean").item()
        logs.append({"loss": mean} | trainer._writer.pop_figures())
    state = model.state_dict()
    return logs, {k: v.full_tensor() for k, v in state.items() if isinstance(v, DTensor)}


if __name__ == "__main__":
    out, engine, *cases = Path(sys.argv[1]), *sys.argv[2:]
    for case in cases:
        trainer = make_for_processes(out / f"{case}-two", case, processes=2)
        logs, weights = by_fsdp(trainer) if engine == "fsdp" else by_trainer(trainer, engine)
        if trainer.is_world_process_zero():
            torch.save({k: v.cpu() for k, v in weights.items()}, out / f"{case}.pt")
            (out / f"{case}.json").write_text(json.dumps(logs))
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.free_memory()
        AcceleratorState._reset_state()
    leave()
