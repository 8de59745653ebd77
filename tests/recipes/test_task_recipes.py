"""The shipped recipes of tasks, from local rows to the report, with tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_setup import ROOT, invoke

NOUNS = ["card", "bank", "loan", "coin", "cash", "bill"]
ENCODER = {
    "model_type": "bert", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 128,
}  # fmt: skip
DECODER = {
    "model_type": "bart", "d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "max_position_embeddings": 128,
}  # fmt: skip


def sentence(number: int) -> str:
    noun, other = NOUNS[number % 6], NOUNS[number // 6 % 6]
    return f"The {noun} number {number} is not the {other} that I wanted to have."


CASES: dict[str, tuple[dict[str, Any], Any, str]] = {
    "classification": (
        ENCODER,
        lambda i: {"text": sentence(i), "label": ["first", "second"][i % 2]},
        "accuracy",
    ),
    "summarization": (
        DECODER,
        lambda i: {"document": sentence(i) * 2, "summary": NOUNS[i % 6]},
        "rouge1",
    ),
    "translation": (
        DECODER,
        lambda i: {"translation": {"en": sentence(i), "es": sentence(i)[::-1]}},
        "bleu",
    ),
    "question_answering": (
        ENCODER,
        lambda i: {
            "question": "what is it?", "context": sentence(i),
            "answers": {"text": [NOUNS[i % 6]], "answer_start": [4]},
        },
        "exact_match",
    ),
    "masked_lm": (ENCODER, lambda i: {"text": sentence(i)}, "perplexity"),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [n if n == "classification" else pytest.param(n, marks=pytest.mark.slow) for n in CASES],
)
def test_a_shipped_recipe(name: str, tmp_path: Path) -> None:
    config, row, metric = CASES[name]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row(i)) + "\n" for i in range(60)))
    teacher = {"config": config, "train": {"max_steps": 3}}
    settings = [
        f"data.train={rows}", "data.eval_split=null", "data.subset=null", "data.eval_fraction=0.3",
        f"teacher={json.dumps(teacher)}", "tokenizer.vocab_size=300", "data.max_length=100",
        "student.num_layers=null" if config is DECODER else "student.num_layers=2",
        "train.max_steps=3", "train.global_batch_size=8", f"output_dir={tmp_path / 'runs'}",
        "evaluate.max_new_tokens=8",
        *(["data.max_target_length=20"] if config is DECODER else []),
    ]  # fmt: skip
    settings += {
        "classification": ["data.columns=null"],
        "question_answering": ["data.stride=8"],
    }.get(name, [])
    words = [word for setting in settings for word in ("--set", setting)]
    done = invoke("run", ROOT / "recipes" / f"{name}.yaml", *words)
    assert done.exit_code == 0, done.output
    folder = tmp_path / "runs" / name
    metrics = json.loads((folder / "metrics.json").read_text())
    for model in ("teacher", "initial", "baseline", "student"):
        assert metric in metrics[model], (model, metrics[model])
    assert (folder / "report.html").stat().st_size > 10_000
    assert (folder / "student" / "README.md").exists()
