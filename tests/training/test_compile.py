"""`torch.compile`: the backbones are compiled, and the fused head runs as it is."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.utils import counters
from trainer_setup import arguments, collate, make_rows, small_model, weights

from hf_distill import DistillationTrainer
from hf_distill.losses import fused_head as fused
from hf_distill.teachers import LiveTeacher

STEPS = 4

# Importing inductor warns of what torch itself deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No compiled code, and no environment that TrainingArguments have set, from another test."""
    for name in ("BACKEND", "MODE", "USE_FULLGRAPH", "USE_REGIONAL_COMPILATION"):
        monkeypatch.delenv(f"ACCELERATE_DYNAMO_{name}", raising=False)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each pass through the fused head, whether it was being compiled."""
    seen: list[bool] = []
    real = fused._Pass.run

    def watching(self: Any, hidden: Tensor, *wanted: bool) -> Any:
        seen.append(torch.compiler.is_compiling())
        return real(self, hidden, *wanted)

    monkeypatch.setattr(fused._Pass, "run", watching)
    return seen


def make_trainer(folder: Path, architecture: str = "llama", **options: Any) -> Any:
    sgd = {"optim": "sgd", "learning_rate": 0.5, "max_steps": STEPS, "temperature": 2.0}
    return DistillationTrainer(
        options.pop("model", None) or small_model(0, architecture),
        small_model(1, architecture),
        arguments(folder, **(sgd | options)),
        train_dataset=make_rows(24, seed=1),
        eval_dataset=make_rows(5, seed=2),
        data_collator=collate,
    )


def trained(folder: Path, **options: Any) -> Any:
    trainer = make_trainer(folder, **options)
    trainer.train()
    return trainer


def check_equal(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    losses = [
        [entry["loss"] for entry in t.state.log_history if "loss" in entry]
        for t in (found, expected)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    close = {"rtol": 10 * tolerance, "atol": tolerance}
    torch.testing.assert_close(weights(found), weights(expected), **close)
    evaluated = [t.evaluate()["eval_loss"] for t in (found, expected)]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=tolerance)


ACTIVATIONS = {
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": {"use_reentrant": False},
}


@pytest.mark.parametrize(
    ("architecture", "backend", "options"),
    [
        ("llama", "aot_eager", {}),
        pytest.param("gpt2", "aot_eager", {}, marks=pytest.mark.slow),
        pytest.param("llama", "aot_eager", ACTIVATIONS, marks=pytest.mark.slow),
        pytest.param("llama", "inductor", {}, marks=pytest.mark.slow),
        pytest.param("gpt2", "inductor", {"bf16": True}, marks=pytest.mark.slow),
    ],
)
def test_compiled_equals_eager(
    architecture: str, backend: str, options: dict[str, Any], tmp_path: Path, heads: list[bool]
) -> None:
    if backend == "inductor" and shutil.which("c++") is None:
        pytest.skip("inductor needs a C++ compiler")
    expected = trained(tmp_path / "a", architecture=architecture, **options)
    heads.clear()
    found = trained(
        tmp_path / "b",
        architecture=architecture,
        torch_compile_backend=backend,
        save_strategy="steps",
        save_steps=STEPS,
        **options,
    )
    assert isinstance(found.model_wrapped, OptimizedModule)
    assert heads == [False] * STEPS
    assert found._loss.student.fused
    assert isinstance(found.teacher, LiveTeacher)
    assert isinstance(found.teacher._compiled, OptimizedModule)
    # Batches of several widths: one graph a model for the first width, one for all others.
    assert counters["stats"]["unique_graphs"] == 4
    check_equal(found, expected, 1e-2 if options.get("bf16") else 1e-5)
    # What is saved has the plain names, and gives the same model.
    saved = tmp_path / "b" / f"checkpoint-{STEPS}"
    again = type(found.model).from_pretrained(saved, output_loading_info=True)
    model, report = again
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(dict(model.state_dict()), weights(found), rtol=0, atol=0)


def test_evaluation_alone(tmp_path: Path, heads: list[bool]) -> None:
    expected = make_trainer(tmp_path / "a").evaluate()
    heads.clear()
    trainer = make_trainer(tmp_path / "b", torch_compile_backend="eager")
    found = trainer.evaluate()
    assert heads == [False]
    assert counters["stats"]["unique_graphs"] == 2
    for name in ("eval_loss", "eval_ce", "eval_forward_kl", "eval_teacher_ce"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
    # The same trainer gives whole logits to whoever asks for them.
    assert trainer.predict(make_rows(5, seed=2)).predictions.shape[-1] == 40


def test_accelerates_own_settings(
    tmp_path: Path, heads: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regions, that is layers and the head, each compiled by itself."""
    expected = trained(tmp_path / "a")
    heads.clear()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    found = trained(tmp_path / "b")
    assert counters["stats"]["unique_graphs"] > 0
    assert isinstance(found.model_wrapped.lm_head, OptimizedModule)
    assert heads == [False] * STEPS
    check_equal(found, expected)


def test_one_graph_means_whole_logits(
    tmp_path: Path,
    heads: list[bool],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = trained(tmp_path / "a")
    heads.clear()
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_FULLGRAPH", "true")
    with caplog.at_level(logging.WARNING):
        found = trained(tmp_path / "b", torch_compile_backend="eager")
    told = [r.message for r in caplog.records if "all of its logits" in r.message]
    assert len(told) == 1
    assert "fullgraph" in told[0]
    assert not heads
    assert found.teacher.runner.fused
    check_equal(found, expected)
