"""What the libraries below chat about is left out of a run's few lines."""

from __future__ import annotations

import logging
import os
import warnings

# At once, since a script imports peft, and peft this, before it can call `quiet`: it speaks of a
# kernel that it can do without.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def quiet() -> None:
    """A run prints a line per stage and progress bars; what libraries chat about is left out."""
    import datasets
    import torch
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
