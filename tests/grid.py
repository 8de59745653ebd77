"""One optimizer step of the real trainer, for every corner that a batch and a pair can have."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import oracle
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_distill import DistillationArguments, DistillationTrainer
from hf_distill.losses import DIVERGENCES

AXES: dict[str, list[Any]] = {
    "architecture": ["gpt2", "llama"],
    "divergence": [*DIVERGENCES, "squared_hellinger"],
    "alpha": [0.0, 0.5, 1.0],
    "temperature": [1.0, 2.0],
    "accumulation": [1, 4],
    "processes": [1, 2],
    "layout": ["right", "left", "packed", "empty"],
    "vocabulary": ["equal", "padded_teacher", "padded_student"],
}
VOCABULARY = 17


@dataclass(frozen=True)
class Case:
    architecture: str
    divergence: str
    alpha: float
    temperature: float
    accumulation: int
    processes: int
    layout: str
    vocabulary: str

    def __str__(self) -> str:
        return "-".join(str(getattr(self, field.name)) for field in fields(self))


def every_case() -> list[Case]:
    return [Case(*values) for values in itertools.product(*AXES.values())]


def every_pair(axes: dict[str, list[Any]] = AXES, kind: Any = Case) -> list[Any]:
    """A few cases that together hold every pair of values of every two axes, chosen greedily."""

    def pairs(case: Any) -> set[tuple[Any, ...]]:
        return set(itertools.combinations(asdict(case).items(), 2))

    left = {
        case: pairs(case) for case in itertools.starmap(kind, itertools.product(*axes.values()))
    }
    missing = set().union(*left.values())
    chosen = []
    while missing:
        best = max(left, key=lambda case: len(left[case] & missing))
        chosen.append(best)
        missing -= left.pop(best)
    return chosen


def make_model(case: Case, seed: int, padded: bool, width: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    rows = VOCABULARY + 6 * padded
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    if case.architecture == "gpt2":
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        shape = {"n_positions": 32, "n_embd": width, "n_layer": 1, "n_head": 2}
        model: torch.nn.Module = GPT2LMHeadModel(
            GPT2Config(vocab_size=rows, **shape, **ids, **dropout)
        )
    else:
        shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 2}
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=rows, num_hidden_layers=1, max_position_embeddings=32, **shape, **ids
            )
        )
    with torch.no_grad():  # sharper than fresh weights, so that no term is nearly nothing
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    return model.eval()


def make_documents(case: Case) -> list[dict[str, list[int]]]:
    """Eight documents of unequal length; "packed" puts pairs of them into one row."""
    generator = torch.Generator().manual_seed(7)
    documents = []
    for number in range(8):
        length = 3 + (5 * number) % 7
        ids = torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()
        prompt = number % 3
        empty = case.layout == "empty" and number not in (0, 5)
        labels = [-100] * (length if empty else prompt) + ([] if empty else ids[prompt:])
        documents.append({"input_ids": ids, "labels": labels})
    return documents


def make_rows(case: Case) -> list[dict[str, Any]]:
    documents = make_documents(case)
    if case.layout != "packed":
        return documents
    rows = []
    for first, second in zip(documents[::2], documents[1::2], strict=True):
        rows.append(
            {
                "input_ids": first["input_ids"] + second["input_ids"],
                # A document's first token has nothing before it, hence is never a target.
                "labels": first["labels"] + [-100] + second["labels"][1:],
                "position_ids": [
                    *range(len(first["input_ids"])),
                    *range(len(second["input_ids"])),
                ],
            }
        )
    # Rows of a packed batch have one length: what is short is filled up as one more document.
    longest = max(len(row["input_ids"]) for row in rows)
    for row in rows:
        fill = longest - len(row["input_ids"])
        row["input_ids"] += [1] * fill
        row["labels"] += [-100] * fill
        row["position_ids"] += range(fill)
    return rows


def collate(rows: list[dict[str, Any]], side: str) -> dict[str, torch.Tensor]:
    if "position_ids" in rows[0]:
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}

    def pad(values: list[list[int]], value: int) -> torch.Tensor:
        return pad_sequence([torch.tensor(v) for v in values], True, value, side)

    return {
        "input_ids": pad([row["input_ids"] for row in rows], 1),
        "labels": pad([row["labels"] for row in rows], -100),
        "attention_mask": pad([[1] * len(row["input_ids"]) for row in rows], 0),
    }


def run(case: Case, folder: Path) -> dict[str, float]:
    """One SGD step with lr 1 on all rows; errors against the oracle, relative."""
    student = make_model(case, 0, case.vocabulary == "padded_student", 8)
    teacher = make_model(case, 1, case.vocabulary == "padded_teacher", 12)
    own = case.divergence == "squared_hellinger"
    expected, gradient = oracle.objective(
        student,
        teacher,
        make_documents(case),
        name=case.divergence,
        alpha=case.alpha,
        temperature=case.temperature,
    )
    rows = make_rows(case)
    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    arguments = DistillationArguments(
        str(folder),
        alpha=case.alpha,
        temperature=case.temperature,
        divergence="forward_kl" if own else case.divergence,
        beta=oracle.BETA,
        skew=oracle.SKEW,
        max_steps=1,
        per_device_train_batch_size=len(rows) // case.processes // case.accumulation or 1,
        gradient_accumulation_steps=case.accumulation // (case.processes if len(rows) < 8 else 1)
        or 1,
        train_sampling_strategy="sequential",
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = DistillationTrainer(
        student,
        teacher,
        arguments,
        divergence=oracle.squared_hellinger if own else None,
        train_dataset=rows,
        data_collator=lambda rows: collate(rows, "left" if case.layout == "left" else "right"),
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    squares = {"error": 0.0, "size": 0.0}
    for name, value in student.named_parameters():
        applied = before[name].double() - value.detach().double()
        truth = gradient.get(name, torch.zeros_like(applied))
        squares["error"] += (applied - truth).square().sum().item()
        squares["size"] += truth.square().sum().item()
    errors = {"gradient": (squares["error"] / squares["size"]) ** 0.5}
    for name in expected:
        if name in logged:  # with alpha 0 the teacher is not asked
            errors[name] = abs(logged[name] - expected[name]) / abs(expected[name])
    return errors
