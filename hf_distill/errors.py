"""Errors and messages: the one error class for users, warnings, and quiet libraries."""

from __future__ import annotations

import logging
import os
import warnings

# Set on import: a script imports peft before it can call `silence_libraries`, and peft imports
# bitsandbytes, which warns about a kernel that is not needed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class InputError(ValueError):
    """An error in the user's input. One line says what was given, why it matters and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


def warn_once(message: str, *values: object) -> None:
    """Log a warning, on the first process only."""
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("hf_distill").warning(message, *values)


def silence_libraries() -> None:
    """Suppress the libraries' own messages, so that a run prints few lines."""
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
