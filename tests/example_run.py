"""A run folder as a finished run leaves it, for tests of what reads one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

RECIPE = """\
name: quickstart
seed: 42
output_dir: runs
data:
  train:
  - '{stdlib}/**/*.py'
  eval_fraction: 0.05
  rows: document
  max_length: 256
  packing: true
tokenizer:
  vocab_size: 4096
teacher:
  config:
    model_type: gpt2
    n_layer: 4
    n_embd: 192
    n_head: 6
  train:
    max_steps: 600
    learning_rate: 0.001
student:
  layers: every_other
baseline: true
train:
  alpha: 0.5
  beta: 0.5
  divergence: forward_kl
  temperature: 2.0
  max_steps: 300
"""

MODELS: dict[str, dict[str, float]] = {
    "teacher": {
        "perplexity": 75.614,
        "bits_per_byte": 1.9321,
        "ce": 4.32564,
        "kl_to_teacher": 0.0,
        "top1_agreement": 1.0,
        "calibration_error": 0.01234,
        "parameters": 2619264,
        "size_mb": 10.4912,
        "prefill_tokens_per_s": 21345.6,
        "decode_tokens_per_s": 251.31,
        "peak_memory_mb": 812.4,
        "targets": 151230,
    },
    "initial": {
        "perplexity": 1834.23,
        "bits_per_byte": 3.3561,
        "ce": 7.5143,
        "kl_to_teacher": 3.4012,
        "top1_agreement": 0.1312,
        "calibration_error": 0.2123,
        "parameters": 1729536,
        "size_mb": 6.9311,
        "prefill_tokens_per_s": 38912.1,
        "decode_tokens_per_s": 455.8,
        "peak_memory_mb": 790.1,
        "targets": 151230,
    },
}
MODELS["baseline"] = MODELS["initial"] | {
    "perplexity": 105.912,
    "bits_per_byte": 2.0823,
    "ce": 4.66261,
    "kl_to_teacher": 0.48123,
    "top1_agreement": 0.6213,
    "calibration_error": 0.02411,
    "train_seconds": 41.23,
}
MODELS["student"] = MODELS["initial"] | {
    "perplexity": 87.902,
    "bits_per_byte": 1.9991,
    "ce": 4.47622,
    "kl_to_teacher": 0.21874,
    "top1_agreement": 0.7342,
    "calibration_error": 0.03126,
    "train_seconds": 63.87,
}

METRICS: dict[str, Any] = {
    **MODELS,
    "comparison": {
        "retention": {"perplexity": 0.8602, "bits_per_byte": 0.9665, "top1_agreement": 0.7342},
        "gap_closed": {"perplexity": 0.5944, "bits_per_byte": 0.5539, "kl_to_teacher": 0.5455},
    },
    "continuations": [
        {
            "prompt": "def _check_arg_types(funcname, *args):\n    hasstr = hasbytes = False\n",
            "teacher": "    for s in args:\n        if type(s) is str:\n            hasstr = True",
            "baseline": "    if not self:\n        return self\n    def __init__(self):",
            "student": "    for s in args:\n        if isinstance(s, str):\n            return s",
        },
        {
            "prompt": '    """Return the number of ',
            "teacher": 'bytes in the file object.\n\n    """\n    return len(self)',
            "baseline": 'the current the current file.\n    """',
            "student": 'bytes in the string.\n    """\n    return self._size',
        },
    ],
    "machine": {
        "platform": "Linux x86_64",
        "cpu": "2 cores",
        "memory_gb": 7.8,
        "accelerator": None,
    },
    "versions": {"hf_distill": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
    "seed": 42,
}

PREPARATION = {
    "steps": [
        {"name": "collect", "split": "train", "rows": 1234, "characters": 10912345},
        {"name": "collect", "split": "eval", "rows": 61, "characters": 540123},
        {
            "name": "clean",
            "split": "train",
            "rows": 1198,
            "characters": 10612345,
            "removed": {"exact duplicate": 20, "near duplicate": 11, "overlap with eval": 5},
            "changed": {"Unicode repaired": 17},
        },
        {
            "name": "clean",
            "split": "eval",
            "rows": 60,
            "characters": 540000,
            "removed": {"short": 1},
        },
        {"name": "tokenize and pack", "split": "train", "rows": 11720, "tokens": 3000320},
        {"name": "tokenize and pack", "split": "eval", "rows": 591, "tokens": 151296},
    ]
}


def log_history(distilled: bool, steps: int = 300) -> list[dict[str, float]]:
    """Entries as Trainer logs them: falling curves with some noise, other keys between them."""
    history: list[dict[str, float]] = []
    floor = 4.47 if distilled else 4.66
    for step in range(5, steps + 1, 5):
        wobble = 0.06 * math.sin(step * 1.7) + 0.04 * math.cos(step * 0.9)
        ce = floor + 3.2 * math.exp(-step / 45) + wobble
        kl = 0.21 + 1.7 * math.exp(-step / 50) + wobble / 3
        entry = {"step": step, "epoch": step / steps, "learning_rate": 1e-3, "grad_norm": 0.7}
        entry |= {"loss": 0.5 * ce + 2 * kl, "ce": ce, "forward_kl": kl} if distilled else {}
        history.append(entry if distilled else entry | {"loss": ce, "ce": ce})
        if step % 60 == 0:
            ce, kl = ce + 0.03 - wobble, (kl if distilled else kl + 0.27) - wobble / 3
            evaluated = {"eval_ce": ce, "eval_forward_kl": kl, "eval_teacher_ce": 4.3256}
            evaluated |= {"eval_loss": 0.5 * ce + 2 * kl if distilled else ce}
            evaluated |= {"eval_top1_agreement": 0.73 - kl / 8, "eval_runtime": 2.1}
            history.append({"step": step, "epoch": step / steps, **evaluated})
    history.append({"step": steps, "train_runtime": 61.0, "train_loss": 5.1})
    return history


def make_run(folder: Path) -> Path:
    """Write the whole run folder, without models and data."""
    files = {
        "recipe.yaml": RECIPE,
        "metrics.json": json.dumps(METRICS),
        "data/preparation.json": json.dumps(PREPARATION),
        "baseline/log_history.json": json.dumps(log_history(distilled=False)),
        "student/log_history.json": json.dumps(log_history(distilled=True)),
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder
