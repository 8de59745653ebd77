"""Teachers whose modules accelerate moves about: the fused head stays, and so do all figures."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from trainer_setup import arguments, collate, make_rows, small_model, weights

from hf_distill import DistillationTrainer
from hf_distill.losses import Hidden, LinearHead, Logits
from hf_distill.losses import fused_head as fused
from hf_distill.losses.divergences import forward_kl
from hf_distill.losses.objective import plain_loss
from hf_distill.losses.weights import Weights
from hf_distill.teachers import LiveTeacher

# The whole model; a head with a hook that stays; a head that visits for its product; all of it.
MAPS = {
    "one": {"": "cpu"},
    "layers": {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu",
               "model.rotary_emb": "cpu", "lm_head": "cpu"},
    "head": {"model": "cpu", "lm_head": "disk"},
    "everything": {"": "disk"},
}  # fmt: skip
TIED = {
    "one": {"": "cpu"},
    "layers": {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.drop": "cpu",
               "transformer.h": "disk", "transformer.ln_f": "cpu", "lm_head": "cpu"},
}  # fmt: skip


def teacher_of(architecture: str = "llama") -> Any:
    return small_model(1, architecture, layers=2)


def trained(folder: Path, teacher: Any, architecture: str = "llama", **options: Any) -> Any:
    trainer = DistillationTrainer(
        small_model(0, architecture),
        teacher,
        arguments(folder, **options),
        train_dataset=make_rows(16, 0),
        eval_dataset=make_rows(8, 1),
        data_collator=collate,
    )
    trainer.train()
    return trainer


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The signal of each pass through the fused head."""
    seen: list[Any] = []
    real = fused._Pass.run

    def watching(self: Any, hidden: Tensor, *wanted: bool) -> Any:
        seen.append(self.signal)
        return real(self, hidden, *wanted)

    monkeypatch.setattr(fused._Pass, "run", watching)
    return seen


def check_equal(found: Any, expected: Any, heads: list[Any]) -> None:
    assert all(isinstance(signal, Hidden) for signal in heads)
    assert len(heads) == found.state.global_step
    assert found.teacher.runner.fused
    torch.testing.assert_close(weights(found), weights(expected), rtol=0, atol=0)
    for name in ("eval_forward_kl", "eval_teacher_ce"):
        assert found.evaluate()[name] == expected.evaluate()[name]


CASES = [*(("llama", name, m) for name, m in MAPS.items())]
CASES += [("gpt2", name, m) for name, m in TIED.items()]


@pytest.mark.parametrize(("architecture", "name", "device_map"), CASES)
def test_a_device_map_changes_nothing(
    architecture: str, name: str, device_map: dict[str, str], tmp_path: Path, heads: list[Any]
) -> None:
    teacher_of(architecture).save_pretrained(tmp_path / "teacher")
    expected = trained(tmp_path / "a", str(tmp_path / "teacher"), architecture)
    heads.clear()
    loading = {"device_map": device_map, "offload_folder": str(tmp_path / "offload")}
    found = trained(
        tmp_path / "b", str(tmp_path / "teacher"), architecture, teacher_model_kwargs=loading
    )
    head = found.teacher.model.lm_head
    assert hasattr(head, "_hf_hook") is (name != "one")
    assert head.weight.is_meta is (name in ("head", "everything"))
    # What a signal holds between the forwards of teacher and student is not a loaded copy.
    assert all(signal.head.weight.is_meta is head.weight.is_meta for signal in heads)
    check_equal(found, expected, heads)
    assert head.weight.is_meta is (name in ("head", "everything"))


@pytest.mark.parametrize("whole", ["model", "head"])
def test_offloaded_to_the_cpu_by_the_user(whole: str, tmp_path: Path, heads: list[Any]) -> None:
    expected = trained(tmp_path / "a", teacher_of())
    heads.clear()
    teacher = teacher_of()
    cpu_offload(teacher if whole == "model" else teacher.lm_head, torch.device("cpu"))
    found = trained(tmp_path / "b", teacher)
    assert teacher.lm_head.weight.is_meta
    check_equal(found, expected, heads)


def test_plain_path_with_an_offloaded_head(tmp_path: Path) -> None:
    expected = trained(tmp_path / "a", teacher_of(), fused_head=False)
    teacher = dispatch_model(teacher_of(), MAPS["head"], offload_dir=tmp_path / "offload")
    found = trained(tmp_path / "b", teacher, fused_head=False)
    torch.testing.assert_close(weights(found), weights(expected), rtol=0, atol=0)


class Unknown(ModelHook):
    """Changes what the head receives, as no device map does."""

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        return tuple(2 * value for value in args), kwargs


def test_other_hooks_on_the_head_are_not_bypassed(
    tmp_path: Path, heads: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    teacher = teacher_of()
    add_hook_to_module(teacher.lm_head, AlignDevicesHook("cpu"))
    add_hook_to_module(teacher.lm_head, Unknown(), append=True)
    with caplog.at_level(logging.WARNING):
        trained(tmp_path, teacher, max_steps=1)
    assert not any(isinstance(signal, Hidden) for signal in heads)
    assert "its output head has hooks" in caplog.text


def test_the_hook_is_whole_again_after_an_error() -> None:
    teacher = teacher_of()
    add_hook_to_module(teacher.lm_head, AlignDevicesHook("cpu"))
    ids = torch.tensor([[2, 3]])
    expected = teacher(ids).logits
    runner = LiveTeacher(teacher).runner
    kept = dict(vars(teacher.lm_head))
    with pytest.raises(ValueError, match="inside"):
        runner._head.forward(teacher, {"input_ids": ids}, fails)  # type: ignore[union-attr]
    assert vars(teacher.lm_head) == kept
    torch.testing.assert_close(teacher(ids).logits, expected, rtol=0, atol=0)


def fails(*_: Any) -> Any:
    raise ValueError("inside")


def test_a_head_on_another_device() -> None:
    """On a simulated device, which refuses tensors of two devices in one operation.

    "lazy" stands for a second GPU: a build for CPUs cannot even slice a simulated CUDA tensor.
    """
    with FakeTensorMode():
        states = torch.empty(7, 16, requires_grad=True)
        head = LinearHead(torch.empty(40, 16, requires_grad=True))
        there = torch.device("lazy")
        theirs = LinearHead(torch.empty(40, 24, device=there))
        signal = Hidden(torch.empty(7, 24, device=there), theirs)
        labels, scale = torch.zeros(7, dtype=torch.int64), torch.ones(())
        weights = Weights(0.5, 0.5, 2.0, forward_kl, 40)
        loss, values = fused.fused_loss(
            states, head, labels, signal, weights, scale=scale, memory_mb=1e-3
        )
        assert {loss.device.type, values["divergence"].device.type} == {"cpu"}
        given = Logits(torch.empty(7, 40, device=there))
        plain, _ = plain_loss(states @ head.weight.t(), labels, given, weights)
        assert plain.device.type == "cpu"
