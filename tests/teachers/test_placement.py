"""Where a teacher's weights lie, and that no figure depends on it."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from trainer_setup import arguments, collate, make_rows, small_model, weights
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_distill import DistillationTrainer, InputError
from hf_distill.models.engines import made_whole
from hf_distill.teachers import LiveTeacher
from hf_distill.teachers.placement import (
    chosen,
    load_placed,
    place,
    placed_by_itself,
    size_of,
    weight_bytes,
)

GB = 10**9


@pytest.mark.parametrize(
    ("placement", "size", "processes", "expected"),
    [
        ("auto", 1 * GB, 8, "replicated"),
        ("auto", 21 * GB, 8, "sharded"),
        ("auto", 140 * GB, 8, "sharded"),
        ("replicated", 140 * GB, 8, "replicated"),
        ("sharded", 1 * GB, 8, "sharded"),
        ("sharded", 1 * GB, 1, "replicated"),  # one shard is the whole
        ("offloaded", 1 * GB, 1, "offloaded"),
    ],
)
def test_the_choice(placement: str, size: int, processes: int, expected: str) -> None:
    assert chosen(placement, size, processes, room=80 * GB) == expected


def test_a_large_teacher_of_one_device_is_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen("auto", 60 * GB, 1, room=80 * GB) == "replicated"  # a CPU has nowhere else
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert chosen("auto", 60 * GB, 1, room=80 * GB) == "offloaded"
    assert chosen("auto", 30 * GB, 1, room=80 * GB) == "replicated"


def trained(folder: Path, placement: str, **options: Any) -> DistillationTrainer:
    small_model(1, layers=2).save_pretrained(folder / "teacher")
    trainer = DistillationTrainer(
        small_model(0),
        str(folder / "teacher"),
        arguments(folder / placement, teacher_placement=placement, **options),
        train_dataset=make_rows(16, 0),
        eval_dataset=make_rows(8, 1),
        data_collator=collate,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("fused", [True, False])
def test_offloaded_equals_replicated(
    fused: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = trained(tmp_path, "replicated", fused_head=fused)
    away = trained(tmp_path, "offloaded", fused_head=fused)
    torch.testing.assert_close(weights(away), weights(whole), rtol=0, atol=0)
    assert away.evaluate()["eval_forward_kl"] == whole.evaluate()["eval_forward_kl"]
    teacher = away.teacher
    assert isinstance(teacher, LiveTeacher)
    # Layers visit the device and leave it; embeddings and head stay.
    assert all(p.is_meta for p in teacher.model.transformer.h.parameters())
    assert not teacher.model.lm_head.weight.is_meta
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("teacher:")]
    size = weight_bytes(small_model(1, layers=2)) / 1e6
    assert told == [
        f"teacher: teacher, replicated, {size:.1f} MB on each of 1 devices",
        f"teacher: teacher, offloaded, {size:.1f} MB on the CPU",
    ]


def test_one_process_has_nothing_to_shard_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path, "sharded")
    assert "one process: there is nothing to shard over" in capsys.readouterr().out


# ---- Reading ----


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device of this process, which is not the CPU: "meta" stands for a GPU."""
    device = torch.device("meta")
    monkeypatch.setitem(PartialState()._shared_state, "device", device)
    return device


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_replicated_teacher_is_read_straight_to_its_device(
    dtype: str | None, tmp_path: Path, elsewhere: torch.device
) -> None:
    small_model(1).save_pretrained(tmp_path / "teacher")
    options = {} if dtype is None else {"dtype": dtype}
    model, placement = load_placed(tmp_path / "teacher", "auto", **options)
    assert placement == "auto"
    assert {p.device for p in model.parameters()} == {elsewhere}
    assert model.dtype == (torch.float32 if dtype is None else torch.bfloat16)
    assert not placed_by_itself(model)  # it is not taken for a device map of the user's
    offloaded, _ = load_placed(tmp_path / "teacher", "offloaded", **options)
    assert {p.device.type for p in offloaded.parameters()} == {"cpu"}


def test_a_device_map_of_one_device_is_kept(tmp_path: Path, elsewhere: torch.device) -> None:
    small_model(1).save_pretrained(tmp_path / "teacher")
    model, _ = load_placed(tmp_path / "teacher", "auto", device_map="cpu")
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    with pytest.raises(InputError, match="has a device_map"):
        place(model, "offloaded", SimpleNamespace(device=elsewhere))  # type: ignore[arg-type]
    assert "as loaded" in place(model, "auto", SimpleNamespace(device=elsewhere))  # type: ignore[arg-type]
    ids = torch.tensor([[2, 3]])
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):  # on their way
        model(input_ids=ids.to("meta"))
    assert model(input_ids=ids).logits.device.type == "cpu"


def test_the_size_is_known_before_reading(tmp_path: Path) -> None:
    teacher = small_model(1, layers=2).to(torch.bfloat16)
    teacher.save_pretrained(tmp_path / "teacher")
    before = torch.get_rng_state()
    assert size_of(tmp_path / "teacher") == weight_bytes(teacher)
    assert size_of(tmp_path / "teacher", dtype="float32") == 2 * weight_bytes(teacher)
    assert size_of(tmp_path / "teacher", quantization_config={"load_in_4bit": True}) is None
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(InputError, match="teacher .*does not exist"):
        size_of(tmp_path / "missing")


def test_fsdps_way_of_loading_is_for_the_student(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with made_whole():
        assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"


# ---- Quantised teachers ----


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("head_too", [False, True])
def test_quantised_teachers(
    bits: int, head_too: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A quantised head has no weight to multiply by: whole logits, with the reason."""
    pytest.importorskip("bitsandbytes")
    shape = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64}
    small_model(1, "llama", 2, **shape).save_pretrained(tmp_path / "teacher")
    asked: dict[str, Any] = {f"load_in_{bits}bit": True}
    if head_too:
        asked["llm_int8_skip_modules"] = []
    quantised = BitsAndBytesConfig(**asked)
    found = {}
    for given in ("path", "model"):
        folder = tmp_path / "teacher"
        teacher: Any = str(folder)
        if given == "model":
            teacher = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantised)
        with caplog.at_level(logging.WARNING):
            trainer = DistillationTrainer(
                small_model(0, "llama"),
                teacher,
                arguments(tmp_path / given, teacher_model_kwargs={"quantization_config": asked}),
                train_dataset=make_rows(16, 0),
                data_collator=collate,
            )
        trainer.train()
        assert trainer.teacher.model.is_quantized  # type: ignore[union-attr]
        assert trainer.teacher.runner.fused is not head_too  # type: ignore[union-attr]
        found[given] = weights(trainer)
    told = [r.message for r in caplog.records if "all of its logits" in r.message]
    kind = "Linear4bit" if bits == 4 else "Linear8bitLt"
    assert told == [] if not head_too else all(kind in message for message in told)
    assert bool(told) is head_too
    torch.testing.assert_close(found["path"], found["model"], rtol=0, atol=0)


class Quantised(nn.Module):
    """A quantised model of a kind that moves, or that refuses to."""

    is_quantized = True

    def __init__(self, moves: bool) -> None:
        super().__init__()
        self.moves, self.weight = moves, nn.Parameter(torch.ones(2))

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def to(self, device: torch.device) -> Any:  # type: ignore[override]
        if not self.moves:
            raise ValueError("`.to` is not supported for this kind of quantisation")
        return super().to(device)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        assert inputs.device == self.device
        return inputs * self.weight


@pytest.mark.parametrize("moves", [True, False])
def test_a_quantised_teacher_meets_its_inputs(moves: bool) -> None:
    """It is on "meta"; its inputs are on the CPU, and its outputs have to be there."""
    model = Quantised(moves)
    model.weight = nn.Parameter(torch.ones(2, device="cpu"))
    there = torch.device("meta")
    told = place(model, "auto", SimpleNamespace(device=there))  # type: ignore[arg-type]
    assert told.startswith("as loaded")
    assert model.device == (there if moves else torch.device("cpu"))
    assert hasattr(model, "_hf_hook") is not moves
    place(model, "auto", SimpleNamespace(device=model.device))  # type: ignore[arg-type]
    assert hasattr(model, "_hf_hook") is not moves


class Wrapped(TwoTensor):
    """A weight made of several tensors, as a quantised one is."""


def test_a_weight_of_several_tensors_is_no_head(caplog: pytest.LogCaptureFixture) -> None:
    model = small_model(1, "llama")
    half = model.lm_head.weight.detach()
    model.lm_head.weight = nn.Parameter(Wrapped(half, half), requires_grad=False)
    with caplog.at_level(logging.WARNING):
        assert not LiveTeacher(model).runner.fused
    assert "the weight of its output head is a Wrapped" in caplog.text
