"""Which of Trainer's checkpoints are whole. Trainer does not write them atomically."""

from __future__ import annotations

import json
from pathlib import Path


def is_complete(checkpoint: Path) -> bool:
    """Was this checkpoint written to its end, on every rank?

    `trainer_state.json` is the last file that Trainer writes, and `DistillationTrainer` puts a
    barrier before it, so that it speaks for all ranks.
    """
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint of a training folder that is whole, or None."""
    found = [
        (int(path.name.removeprefix("checkpoint-")), path)
        for path in Path(output_dir).glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit() and is_complete(path)
    ]
    return str(max(found)[1]) if found else None
