"""The objective through the real trainer equals a float64 oracle, value and applied gradient.

The everyday tier holds every pair of values of every two axes; the slow tier the whole grid.
"""

from __future__ import annotations

import json
from pathlib import Path

import grid
import pytest
from distributed import launch

TOLERANCE = 1e-4


def too_far(errors: dict[str, float]) -> bool:
    return "gradient" not in errors or any(not error < TOLERANCE for error in errors.values())


@pytest.mark.parametrize("case", [c for c in grid.every_pair() if c.processes == 1], ids=str)
def test_one_process(case: grid.Case, tmp_path: Path) -> None:
    errors = grid.run(case, tmp_path)
    assert not too_far(errors), errors


def test_two_processes(tmp_path: Path) -> None:
    launch("grid_worker.py", "pairs", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == sum(case.processes == 2 for case in grid.every_pair())
    assert not {name: errors for name, errors in found.items() if too_far(errors)}


@pytest.mark.slow
@pytest.mark.parametrize("divergence", grid.AXES["divergence"])
@pytest.mark.parametrize("architecture", grid.AXES["architecture"])
def test_whole_grid_one_process(architecture: str, divergence: str, tmp_path: Path) -> None:
    cases = [
        case
        for case in grid.every_case()
        if (case.architecture, case.divergence, case.processes) == (architecture, divergence, 1)
    ]
    found = {str(case): grid.run(case, tmp_path) for case in cases}
    assert len(found) == len(cases)
    assert not {name: errors for name, errors in found.items() if too_far(errors)}


@pytest.mark.slow
def test_whole_grid_two_processes(tmp_path: Path) -> None:
    launch("grid_worker.py", "all", str(tmp_path / "found.json"), timeout_s=3000)
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == len(grid.every_case()) // 2
    assert not {name: errors for name, errors in found.items() if too_far(errors)}
