"""The packages of the library, in the order in which they may import each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import hf_distill

# A package imports only from those above it in this list.
PACKAGES = [
    "errors",
    "losses",
    "models",
    "tasks",
    "data",
    "pipelines",
    "teachers",
    "recordings",
    "evaluation",
    "reporting",
    "training",
    "recipes",
    "cli",
]
ROOT = Path(hf_distill.__file__).parent


def imported_packages(file: Path) -> set[str]:
    """The packages of this library that a file imports, at any depth of the file."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module == "hf_distill":
            names = [f"hf_distill.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("hf_distill.")}
    return found & set(PACKAGES)


def test_every_entry_is_a_known_package() -> None:
    ignored = {"__init__", "__pycache__", "py"}
    entries = {path.name.split(".")[0] for path in ROOT.iterdir()} - ignored
    assert entries == set(PACKAGES)
    assert len(entries) <= 13


def test_packages_import_only_from_those_above_them() -> None:
    wrong, looked_at = [], 0
    for place, package in enumerate(PACKAGES):
        files = [*(ROOT / package).rglob("*.py"), *ROOT.glob(f"{package}.py")]
        for file in files:
            looked_at += 1
            for other in imported_packages(file) - {package}:
                if PACKAGES.index(other) > place:
                    wrong.append(f"{file.relative_to(ROOT)} imports {other}")
    assert looked_at > 50
    assert not wrong


def test_public_names_exist() -> None:
    for name in hf_distill.__all__:
        assert getattr(hf_distill, name).__doc__


def test_imports_that_users_wait_for() -> None:
    # The help needs no torch, and a trainer no library of metrics.
    code = (
        "import sys, hf_distill.cli; print([n for n in ('torch', 'peft') if n in sys.modules]); "
        "hf_distill.DistillationTrainer; print('evaluate' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "False"]
