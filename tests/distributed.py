"""Run a script on several gloo processes, as torchrun does, and read what it found."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import torch

TESTS = Path(__file__).parent


def leave() -> NoReturn:
    """How a worker ends once its results are written.

    3 of some 300 workers ended in "terminate called without an active exception" in the
    interpreter's exit: a thread of gloo that still lets go of a tensor finds no interpreter.
    """
    torch.distributed.barrier()
    gc.collect()  # DDP wrappers, in reference cycles, hold the group and its threads
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def launch(script: str, *arguments: str, processes: int = 2, timeout_s: int = 600) -> str:
    """Standard output of `torchrun script arguments`; fails the test with its errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += [f"--master_port={port}", str(TESTS / script), *arguments]
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, env=environment
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout
