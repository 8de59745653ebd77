"""Report errors in one line, set exit codes, and clean up processes at the end of a command."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from tqdm import tqdm

from hf_distill.errors import InputError, silence_libraries


@contextmanager
def guarded(debug: bool = False) -> Iterator[None]:
    """Report errors in one line, with exit code 2 for bad input and 1 for other errors."""
    silence_libraries()
    try:
        yield
    except typer.Exit:
        raise
    except (InputError, KeyboardInterrupt, Exception) as error:
        if debug and not isinstance(error, KeyboardInterrupt):
            raise
        _fail(error)
    # Without this, DeepSpeed on the CPU, and sometimes gloo's threads, abort at exit. DDP wrappers
    # in reference cycles keep them alive and have to be freed first.
    import torch

    gc.collect()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _fail(error: BaseException) -> NoReturn:
    """Print the error once and exit. If all processes fail alike, only the first one prints."""
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        # The launcher ends this process as soon as the first one has ended with the same error.
        time.sleep(5)
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # so that the message begins a line
    where = f" (process {rank})" if rank else ""
    message, code = _described(error)
    typer.echo(f"error{where}: {message}", err=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # No clean-up: it would wait for the other processes for ever.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise typer.Exit(code)


def _described(error: BaseException) -> tuple[str, int]:
    text = " ".join(str(error).split())
    if isinstance(error, InputError):
        return text, 2
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; run the same command again to continue", 130
    return f"{type(error).__name__}: {text[:300]} (--debug shows where)", 1
