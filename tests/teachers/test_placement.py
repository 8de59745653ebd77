"""Where a teacher's weights lie, and that no figure depends on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_setup import arguments, collate, make_rows, small_model, weights

from hf_distill import DistillationTrainer
from hf_distill.teachers import LiveTeacher
from hf_distill.teachers.placement import chosen, weight_bytes

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
