"""Weights for each row: against the oracle, through every path, and at no cost where unused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from datasets import Dataset
from trainer_setup import arguments, collate, make_rows, small_model

from hf_distill import DistillationTrainer, InputError, record

CE = [1.0, 0.0, 2.5, 0.0, 0.5, 1.0, 0.0, 3.0]
DIVERGENCE = [0.5, 1.0, 0.0, 2.0, 0.0, 1.0, 1.5, 0.0]


def weighted_rows(**columns: list[float]) -> list[dict[str, Any]]:
    rows = make_rows(8, seed=5)
    return [
        {**row, **{name: values[i] for name, values in columns.items()}}
        for i, row in enumerate(rows)
    ]


def truth(
    rows: list[dict[str, Any]], alpha: float, temperature: float
) -> tuple[float, dict[str, torch.Tensor]]:
    """L from the sums of each row by itself; CE and divergence each over their own targets."""
    total, gradients = 0.0, {}
    counts = {"ce": 0, "divergence": 0}
    for row in rows:
        targets = sum(label != -100 for label in row["labels"][1:])
        for name in counts:
            counts[name] += targets * (row.get(f"{name}_weight", 1.0) != 0)
    for row in rows:
        targets = sum(label != -100 for label in row["labels"][1:])
        for name, share in (("ce", 1 - alpha), ("divergence", alpha)):
            weight = row.get(f"{name}_weight", 1.0) * share / counts[name]
            if not weight or not targets:
                continue
            values, slopes = oracle.objective(
                small_model(0), small_model(1), [row], name="forward_kl",
                alpha=float(name == "divergence"), temperature=temperature,
            )  # fmt: skip
            total += weight * targets * values["loss"]
            for key, slope in slopes.items():
                gradients[key] = gradients.get(key, 0.0) + weight * targets * slope
    return total, gradients


def trainer(tmp_path: Path, rows: Any, **options: Any) -> DistillationTrainer:
    settings = {
        "alpha": 0.3, "temperature": 2.0, "max_steps": 1, "optim": "sgd", "learning_rate": 1.0,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential", "per_device_train_batch_size": 8,
    }  # fmt: skip
    teacher = options.pop("teacher", small_model(1))
    return DistillationTrainer(
        small_model(0),
        teacher,
        arguments(tmp_path, **(settings | options)),
        train_dataset=rows,
        eval_dataset=rows,
    )


@pytest.mark.parametrize("fused_head", [True, False])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    "columns",
    [{"ce_weight": CE}, {"divergence_weight": DIVERGENCE},
     {"ce_weight": CE, "divergence_weight": DIVERGENCE}],
    ids=["ce", "divergence", "both"],
)  # fmt: skip
def test_value_and_gradient(
    columns: dict[str, list[float]], accumulation: int, fused_head: bool, tmp_path: Path
) -> None:
    rows = weighted_rows(**columns)
    expected, slopes = truth(rows, 0.3, 2.0)
    one = trainer(
        tmp_path, rows, fused_head=fused_head,
        per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    assert one.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
    before = {name: p.detach().clone() for name, p in one.model.named_parameters()}
    one.train()
    logged = one.state.log_history[0]
    assert logged["loss"] == pytest.approx(expected, rel=1e-4)
    assert logged["loss"] == pytest.approx(0.7 * logged["ce"] + 0.3 * 4 * logged["forward_kl"])
    for name, parameter in one.model.named_parameters():
        moved = (before[name] - parameter.detach()).double()
        torch.testing.assert_close(moved, slopes[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("kind", ["top_k", "sampled", "full"])
def test_recordings(kind: str, tmp_path: Path) -> None:
    """A recorded row of weight w costs what w rows of weight 1 cost."""
    rows = Dataset.from_list(weighted_rows(divergence_weight=DIVERGENCE, ce_weight=CE))
    whole = {"k": 40} if kind == "top_k" else {}
    recorded = record(rows, small_model(1), tmp_path / "r", kind=kind, **whole)
    options = {"teacher": None, "temperature": 1.0}
    found = trainer(tmp_path, recorded, **options).evaluate()
    plain = trainer(tmp_path, recorded, fused_head=False, **options).evaluate()
    assert found["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)
    if kind != "sampled":
        live = trainer(tmp_path, rows, temperature=1.0).evaluate()
        assert found["eval_forward_kl"] == pytest.approx(live["eval_forward_kl"], rel=2e-2)
    assert found["eval_ce"] == pytest.approx(
        trainer(tmp_path, rows, temperature=1.0).evaluate()["eval_ce"], rel=1e-5
    )


def test_ones_change_nothing(tmp_path: Path) -> None:
    rows = make_rows(8, seed=5)
    ones = [{**row, "ce_weight": 1.0, "divergence_weight": 1.0} for row in rows]
    assert trainer(tmp_path, ones).evaluate()["eval_loss"] == pytest.approx(
        trainer(tmp_path, rows).evaluate()["eval_loss"], rel=1e-6
    )


def test_rows_without_labels_to_learn(tmp_path: Path) -> None:
    """CE off in some rows: its mean runs over the others."""
    rows = weighted_rows(ce_weight=[0.0] * 4 + [1.0] * 4)
    found = trainer(tmp_path, rows).evaluate()
    rest = trainer(tmp_path, make_rows(8, seed=5)[4:]).evaluate()
    assert found["eval_ce"] == pytest.approx(rest["eval_ce"], rel=1e-5)
    assert found["eval_teacher_ce"] == pytest.approx(rest["eval_teacher_ce"], rel=1e-5)
    assert found["eval_forward_kl"] != pytest.approx(rest["eval_forward_kl"], rel=1e-3)


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_formatted_data_sets(form: str, tmp_path: Path) -> None:
    rows = Dataset.from_list(weighted_rows(ce_weight=CE, divergence_weight=DIVERGENCE))
    found, plain = (trainer(tmp_path, data).evaluate() for data in (rows.with_format(form), rows))
    assert found["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("weight", [-1.0, "much", "1.0", [1.0, 2.0]])
def test_refused(weight: Any, tmp_path: Path) -> None:
    rows = [{**row, "ce_weight": weight} for row in make_rows(8, seed=5)]
    with pytest.raises(InputError, match=r"ce_weight is .* must be a number of at least 0"):
        trainer(tmp_path, rows).train()


def test_batches_whose_rows_have_no_weight(tmp_path: Path) -> None:
    """A step's mean is the same wherever the rows without a weight are."""
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        rows = make_rows(8, 0)
        for row in rows[:2]:
            row["ce_weight"] = 0.0
        trainer = DistillationTrainer(
            small_model(0),
            small_model(1),
            arguments(
                tmp_path, max_steps=1, per_device_train_batch_size=size, optim="sgd",
                gradient_accumulation_steps=accumulation, train_sampling_strategy="sequential",
                learning_rate=0.5,
            ),
            train_dataset=rows,
            data_collator=collate,
        )  # fmt: skip
        trainer.train()
        found.append(dict(trainer.model.named_parameters()))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-6)
