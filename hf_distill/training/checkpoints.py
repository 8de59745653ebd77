"""Find complete and resumable checkpoints. Trainer does not write checkpoints atomically."""

from __future__ import annotations

import json
from pathlib import Path

from hf_distill.errors import InputError, warn_once


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end, on every rank.

    `trainer_state.json` is the last file that Trainer writes. `DistillationTrainer` puts a barrier
    before it, so the file exists only after all ranks have finished.
    """
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint of a training folder, or None."""
    found = [
        (int(path.name.removeprefix("checkpoint-")), path)
        for path in Path(output_dir).glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit() and is_complete(path)
    ]
    return str(max(found)[1]) if found else None


def checkpoint_to_resume(
    wanted: str | bool | None, output_dir: str, *, deepspeed: bool
) -> str | None:
    """The checkpoint that `train(resume_from_checkpoint=...)` means; None for a fresh start.

    deepspeed: whether DeepSpeed trains now
    raises: InputError if there is no complete one, or if another engine has written it
    """
    if wanted is True:
        wanted = last_complete_checkpoint(output_dir)
        if wanted is None:
            raise InputError(
                f"there is no complete checkpoint in {output_dir!r} to resume from: "
                "train without resume_from_checkpoint"
            )
    if not wanted:
        return None
    checkpoint = Path(str(wanted))
    if not is_complete(checkpoint):
        raise InputError(
            f"checkpoint {str(checkpoint)!r} is missing or was interrupted while being written "
            "(no readable trainer_state.json): resume from an earlier one"
        )
    _check_engine(checkpoint, deepspeed)
    return str(checkpoint)


def _check_engine(checkpoint: Path, deepspeed: bool) -> None:
    """Refuse another engine's checkpoint, or log which parts of it cannot be used."""
    written_by_deepspeed = any(checkpoint.glob("global_step*"))
    if deepspeed and not written_by_deepspeed:
        raise InputError(
            f"checkpoint {str(checkpoint)!r} was not written under DeepSpeed, which cannot "
            "read it: resume with the engine that wrote it, or give that folder as the model"
        )
    if written_by_deepspeed and not deepspeed:
        if not list(checkpoint.glob("*.safetensors")):
            raise InputError(
                f"checkpoint {str(checkpoint)!r} has its weights in DeepSpeed's shards only: "
                "resume under DeepSpeed, or convert them with its zero_to_fp32.py "
                "(zero3_save_16bit_model: true in accelerate's configuration saves them whole)"
            )
        warn_once(
            "%s was written under DeepSpeed: its weights are used, with a new optimizer.",
            checkpoint,
        )
