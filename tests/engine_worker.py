"""Some steps on two processes, and what shows which engine was on.

    engine_worker.py FOLDER ENGINE CASE...

ENGINE: ddp, zero1, zero2, zero3 (as accelerate's configuration says), or fsdp, which is torch's own
`fully_shard` around the trainer's loss, since accelerate leaves it out on CPUs.
CASE: ARCHITECTURE-STUDENT-TEACHER, as gpt2-lora-sharded; the parts are in `make_trainer`. Further
parts are of `HOW`, or "features" for feature losses with projections to a wider teacher.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from distributed import leave
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from trainer_setup import arguments, make_rows, small_model

from hf_distill import DistillationTrainer, record
from hf_distill.data import Collator

STEPS, ROWS = 10, 8
# Neither changes any figure.
NOT_REENTRANT = {"use_reentrant": False}
HOW: dict[str, dict[str, Any]] = {
    "compiled": {"torch_compile_backend": "aot_eager"},
    "checkpointed": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": NOT_REENTRANT,
    },
}

FEATURES = {"hidden_mse": 1.0, "embeddings": 0.5, "attention": 1.0, "relations": 1.0}
WIDER = {"gpt2": {"n_embd": 24}, "llama": {"hidden_size": 24}}


def rows() -> Dataset:
    """Unequal numbers of targets; the second of two processes has none in the second step."""
    made = make_rows(STEPS * ROWS, 0)
    for row in made[12:16]:
        row["labels"] = [-100] * len(row["labels"])
    return Dataset.from_list(made)


def with_adapter(model: Any) -> Any:
    transposed = model.config.model_type == "gpt2"
    names = ["c_attn"] if transposed else ["q_proj", "v_proj"]
    torch.manual_seed(3)
    return get_peft_model(
        model,
        LoraConfig(r=4, target_modules=names, init_lora_weights=False, fan_in_fan_out=transposed),
    )


def teacher_of(case: str) -> Any:
    architecture = case.split("-")[0]
    return small_model(1, architecture, 2, **(WIDER[architecture] if "features" in case else {}))


def make_trainer(folder: Path, case: str, processes: int, **options: Any) -> DistillationTrainer:
    """The same for one process and for several: every step sees the same rows."""
    architecture, student_kind, teacher_kind, *how = case.split("-")
    for name in how:
        options = ({"features": FEATURES} if name == "features" else HOW[name]) | options
    model = small_model(0, architecture)
    if student_kind == "lora":
        model = with_adapter(model)
    teacher = teacher_of(case)
    data, collate = rows(), Collator(1, 0)
    placement, given = "replicated", teacher
    if teacher_kind == "recorded":
        data = record(data, teacher, folder / case, kind="full", data_collator=collate)
        given = None
    elif teacher_kind == "itself":
        given = model
    elif teacher_kind == "copy":  # what "itself" has to equal
        given = small_model(0, architecture)
    elif teacher_kind == "stream":  # a live teacher, and rows that are read one by one
        data = data.to_iterable_dataset()
    else:
        placement = teacher_kind
    return DistillationTrainer(
        model,
        given,
        arguments(
            folder / f"{case}-out",
            max_steps=STEPS,
            temperature=2.0,
            per_device_train_batch_size=ROWS // processes,
            train_sampling_strategy="sequential",
            max_grad_norm=0.0,
            optim="sgd",  # which does not hide a factor, as Adam would
            learning_rate=0.1,
            lr_scheduler_type="constant",
            teacher_placement=placement,
            **options,
        ),
        train_dataset=data,
        data_collator=collate,
    )


def check_partition(engine: Any, stage: int, whole: int) -> None:
    """Each process keeps the optimizer's float32 copy of its own half, up to padding."""
    assert engine.zero_optimization_stage() == stage, engine.zero_optimization_stage()
    parts = (
        engine.optimizer.single_partition_of_fp32_groups
        if stage < 3
        else engine.optimizer.fp32_partitioned_groups_flat
    )
    held = sum(part.numel() for part in parts)
    assert held <= whole // 2 + 64, (held, whole)


def check_shards(trainer: DistillationTrainer, whole: int) -> None:
    """A sharded teacher holds half of its weights here, up to padding, and no whole layer."""
    teacher: Any = trainer.teacher
    assert teacher.together
    parameters = list(teacher.model.parameters())
    assert all(isinstance(p, DTensor) for p in parameters)
    assert sum(p.to_local().numel() for p in parameters) <= whole // 2 + 64


def train_fsdp(trainer: DistillationTrainer) -> tuple[list[float], dict[str, Tensor]]:
    """Trainer's steps with `fully_shard` as the engine: layers, an untied head, and the rest."""
    model: Any = trainer.model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    trainer._loss.features.attach()
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    tied = base.config.tie_word_embeddings
    layers = base.transformer.h if hasattr(base, "transformer") else base.model.layers
    for part in [*layers, *([] if tied else [base.lm_head]), model]:
        fully_shard(part, mesh=mesh)
    if trainer.args.torch_compile:
        model = torch.compile(model, backend=trainer.args.torch_compile_backend)
    if trainer.args.activation_checkpointing:
        base.gradient_checkpointing_enable(NOT_REENTRANT)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(isinstance(p, DTensor) for p in trained)
    optimizer = torch.optim.SGD(trained, lr=trainer.args.learning_rate)
    losses = []
    model.train()
    mine = iter(trainer.accelerator.prepare_data_loader(trainer.get_train_dataloader()))
    for _ in range(STEPS):
        batch = next(mine)
        counts = trainer._get_num_items_in_batch([batch], trainer.args.device)
        loss = trainer.compute_loss(model, batch, num_items_in_batch=counts)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(trainer.accelerator.reduce(loss.detach(), "mean").item())
    trainer._loss.features.detach()
    state = trainer.model.state_dict()
    whole = {k: v.full_tensor() for k, v in state.items() if isinstance(v, DTensor)}
    return losses, whole


def run(folder: Path, engine: str, case: str) -> None:
    trainer = make_trainer(folder, case, processes=2)
    trained = [*trainer.model.parameters(), *trainer._loss.features.projections.parameters()]
    whole = sum(p.numel() for p in trained if p.requires_grad)
    if "sharded" in case:
        check_shards(trainer, teacher_of(case).num_parameters())
    assert trainer._loss.student.fused
    if engine == "fsdp":
        losses, weights = train_fsdp(trainer)
    else:
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        wrapped: Any = trainer.model_wrapped
        if engine.startswith("zero"):
            check_partition(wrapped, int(engine[-1]), whole)
            assert wrapped.is_compiled is case.endswith("compiled")
        else:
            assert isinstance(wrapped, OptimizedModule) is case.endswith("compiled")
            wrapped = getattr(wrapped, "_orig_mod", wrapped)
            assert type(wrapped).__name__ == "DistributedDataParallel"
        weights = trainer.accelerator.get_state_dict(wrapped)
    assert trainer._loss.student.fused  # the fused head has served to the end
    if trainer.is_world_process_zero():
        torch.save({k: v.cpu() for k, v in weights.items()}, folder / f"{case}.pt")
        world = torch.distributed.get_world_size()
        (folder / f"{case}.json").write_text(json.dumps({"world": world, "losses": losses}))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    AcceleratorState._reset_state()


SAVING = {"save_strategy": "steps", "save_steps": STEPS // 2}


def interrupt(folder: Path, case: str) -> None:
    """The weights after all steps, and after going on from the checkpoint half way."""
    for name, resume in (("whole", None), ("resumed", f"checkpoint-{STEPS // 2}")):
        trainer = make_trainer(folder, case, processes=2, **SAVING)
        trainer.train(resume and str(Path(trainer.args.output_dir) / resume))
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if trainer.is_world_process_zero():
            torch.save({k: v.cpu() for k, v in weights.items()}, folder / f"{name}.pt")
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.free_memory()
        AcceleratorState._reset_state()


def for_long(folder: Path, case: str) -> None:
    """More steps than anybody waits for, with a checkpoint at every second one."""
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    trainer = make_trainer(folder, case, processes=2, **options)
    trainer.args.max_steps, trainer.args.num_train_epochs = 100_000, 100_000
    (folder / f"pid-{trainer.args.process_index}").write_text(str(os.getpid()))
    trainer.train()


if __name__ == "__main__":
    where, engine, *cases = sys.argv[1:]
    if cases[0] == "interrupt":
        interrupt(Path(where), cases[1])
    elif cases[0] == "for_long":
        for_long(Path(where), cases[1])
    else:
        for case in cases:
            run(Path(where), engine, case)
    leave()
