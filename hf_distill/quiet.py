"""What the libraries below chat about is left out of a run's few lines."""

from __future__ import annotations

import logging
import os
import warnings

import torch


def quiet() -> None:
    """A run prints a line per stage and progress bars; what libraries chat about is left out."""
    # Before peft imports it: it speaks of a kernel that it can do without.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import datasets
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns if it is left to guess
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of loading and writing weights
    datasets.logging.set_verbosity_error()
    for name in ("torch.distributed", "huggingface_hub", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|transformers|accelerate|deepspeed|peft)\b")
