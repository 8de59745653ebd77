"""The house: imports point to lower floors only, and what is public is importable."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import hf_distill

PACKAGE = Path(hf_distill.__file__).parent

FLOORS = (
    {"errors", "divergences", "targets", "gradients", "blocks", "head", "features"},
    {
        "engines",
        "quiet",
        "pretrained",
        "checkpoints",
        "objective",
        "vocabulary",
        "students",
        "pretraining",
        "stand_in",
        "data",
        "recording",
    },
    {"teachers", "metrics", "figures", "card", "comparison"},
    {"arguments", "artifacts", "trainer", "evaluation", "measure", "recorder", "recorded_rows"},
    {"plots", "report", "hub", "recipe"},
    {"stages", "planning", "cli", "__init__", "__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Within a floor a room may stand on its neighbour in this order, never in a circle.
ORDER = {
    "pretrained": 0, "errors": 0, "engines": 0, "checkpoints": 0, "figures": 0, "arguments": 0,
    "measure": 0,
    "artifacts": 1, "recorded_rows": 1,
    "divergences": 1, "targets": 1, "gradients": 2, "blocks": 3, "head": 4,
    "stand_in": 1, "objective": 1, "vocabulary": 1, "pretraining": 1,
    "plots": 1, "card": 2, "data": 2, "students": 2, "trainer": 2, "evaluation": 2,
    "hub": 3, "report": 3, "stages": 0, "planning": 1, "cli": 2, "recipe": 1,
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """The rooms of this package that a file imports, at any depth of the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module == "hf_distill":
            names = [f"hf_distill.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("hf_distill.")}
    return found & FLOOR.keys()


def test_imports_point_to_lower_floors() -> None:
    wrong, looked_at = [], 0
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        assert room in FLOOR, f"{room} stands on no floor"
        for other in imports(path) - {room}:
            looked_at += 1
            here = FLOOR[room], ORDER.get(room, 1)
            there = FLOOR[other], ORDER.get(other, 1)
            if there >= here and room != "__init__":
                wrong.append(f"{path.relative_to(PACKAGE)} imports {other}")
    assert looked_at > 20
    assert not wrong


def test_public_names_exist() -> None:
    for name in hf_distill.__all__:
        assert getattr(hf_distill, name).__doc__


def test_help_does_not_wait_for_torch() -> None:
    said = "import sys, hf_distill.cli; print([n for n in ('torch', 'peft') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
