"""What a recording takes and what it loses: bytes a target, and the error of the gradient.

    make real-models
    python benchmarks/recording_bytes.py --text FILE
    python benchmarks/recording_bytes.py --text FILE --student FOLDER --json
    python benchmarks/recording_bytes.py --text FILE --teacher FOLDER [--gguf FILE] --student FOLDER

The text is a plain, .gz or .xz file. The teacher is SmolLM2-135M by default, and the student 24 of
its layers, those of the most influence, untrained. The gradient is that of the forward KL by the
student's logits at temperature 1, compared with that from the whole distribution: cosine, and
length of the difference over its length. `rounding` is this error over that of exact values at the
same k. Bytes are those of the whole column, in rows of --length tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pruning import DTYPE, add_teacher, rows_of, teacher_and_tokenizer
from torch import Tensor

from hf_distill.errors import silence_libraries
from hf_distill.losses.divergences import forward_kl
from hf_distill.losses.kernels.torch import value_and_gradient
from hf_distill.losses.signals import Sampled, Signal, TopK
from hf_distill.losses.weights import Weights
from hf_distill.models import load_model, student_from_teacher
from hf_distill.recordings import codec
from hf_distill.recordings.extract import sampled, top_k_
from hf_distill.recordings.row_format import CHECKSUM, LAYOUT

TOP_K, DRAWS = (8, 16, 32, 64, 128, 256), (25, 50, 100, 200)
Method = Callable[[Tensor, Tensor], tuple[int, Signal]]


def signal_of(content: codec.TopK | codec.Sampled, labels: Tensor) -> Signal:
    """What a student reads of a recording."""
    if isinstance(content, codec.Sampled):
        share = content.counts / content.counts.sum(1, keepdims=True)
        return Sampled(
            torch.from_numpy(content.ids), torch.from_numpy(share).float(),
            torch.from_numpy(np.array(content.entropy)),
        )  # fmt: skip
    outside = torch.from_numpy(~np.isnan(content.log_label))
    ids = torch.cat([torch.from_numpy(content.ids), torch.where(outside, labels, -1)[:, None]], 1)
    label = torch.from_numpy(np.nan_to_num(content.log_label))[:, None]
    log_probs = torch.cat([torch.from_numpy(content.log_probs), label], 1)
    return TopK(ids, log_probs, torch.from_numpy(np.array(content.log_tail)))


def top_k(k: int, *, exact: bool = False) -> Method:
    def record(logits: Tensor, labels: Tensor) -> tuple[int, Signal]:
        said = top_k_(logits.clone(), labels, k)
        data = codec.encode_top_k(said)
        if not exact:
            said = codec.decode_top_k(data, *said.ids.shape, logits.shape[1])
        return len(data), signal_of(said, labels)

    return record


def draws(number: int) -> Method:
    generator = torch.Generator().manual_seed(0)

    def record(logits: Tensor, labels: Tensor) -> tuple[int, Signal]:
        data = codec.encode_sampled(sampled(logits, number, generator))
        return len(data), signal_of(codec.decode_sampled(data, *logits.shape), labels)

    return record


def gradient(student: Tensor, labels: Tensor, signal: Signal | Tensor) -> Tensor:
    weights = Weights(0.0, 1.0, 1.0, forward_kl, student.shape[1])
    return value_and_gradient(student.clone(), labels, signal, weights)[1]


def measure(method: Method, rows: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, float]:
    """Bytes a target, cosine and relative error, over all rows (teacher, student, labels)."""
    size = targets = 0
    squares = torch.zeros(3, dtype=torch.float64)  # of the whole gradient, of this, their product
    for teacher, student, labels in rows:
        data, signal = method(teacher, labels)
        whole, found = (gradient(student, labels, s).double() for s in (teacher, signal))
        size += data + LAYOUT.size + CHECKSUM.size
        targets += len(labels)
        squares += torch.stack(
            [(whole * whole).sum(), (found * found).sum(), (whole * found).sum()]
        )
    whole_square, square, product = squares.tolist()
    return {
        "bytes": size / targets,
        "cosine": product / (whole_square * square) ** 0.5,
        "error": ((whole_square + square - 2 * product) / whole_square) ** 0.5,
    }


@torch.no_grad()
def outputs(model: Any, rows: list[dict[str, list[int]]]) -> list[Tensor]:
    """The logits at the targets of each row, float32."""
    return [
        model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].float() for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_teacher(parser)
    parser.add_argument("--student", help="folder or id")
    parser.add_argument("--text", required=True, help="held-out text")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    silence_libraries()
    teacher, tokenizer = teacher_and_tokenizer(options)
    rows = rows_of(options.text, tokenizer, options.rows, options.length)
    if options.student:
        student = load_model(options.student, "student", dtype=DTYPE).eval()
    else:
        student = student_from_teacher(teacher, "influence", num_layers=24, rows=rows).eval()
    labels = [torch.tensor(row["input_ids"][1:]) for row in rows]
    known = list(zip(outputs(teacher, rows), outputs(student, rows), labels, strict=True))
    for k in TOP_K:
        found, exact = measure(top_k(k), known), measure(top_k(k, exact=True), known)
        show({"kind": "top_k", "k": k} | found | {"rounding": found["error"] / exact["error"]},
             as_json=options.json)  # fmt: skip
    for number in DRAWS:
        show({"kind": "sampled", "draws": number} | measure(draws(number), known),
             as_json=options.json)  # fmt: skip


def show(row: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(row), flush=True)
        return
    said = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in row.items())  # fmt: skip
    print("  ".join(said), flush=True)


if __name__ == "__main__":
    main()
