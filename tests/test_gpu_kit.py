"""The kit for a GPU machine: its dry run, cases that break their process, wheels, ratios."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


@pytest.mark.slow
def test_a_dry_run_goes_through_every_section(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(BENCHMARKS / "gpu.sh"), "--dry", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    log = (tmp_path / "gpu.log").read_text()
    assert result["dry"]
    assert result["finished"]
    sections = result["sections"]
    assert list(sections) == ["install", "machine", "tests", "head", "step"]
    assert sections["install"]["status"] == "skipped"
    for name in ("machine", "tests", "head", "step"):
        assert sections[name]["status"] == "ok", f"{name}: {sections[name]}\n{log[-6000:]}"
        assert sections[name]["left_out"] == 0
    assert result["machine"]["torch"]
    assert result["machine"]["card"] is None
    for name in ("head", "step"):  # of other libraries only, where they are not installed
        failed = [row for row in sections[name]["rows"] if "error" in row]
        assert {row["variant"] for row in failed} <= {"liger", "trl", "gkd"}, failed
        assert all(row["error"].startswith("not installed") for row in failed)
    ours = [row for row in sections["head"]["rows"] if row["variant"] == "ours"]
    assert [row["agrees"] for row in ours] == [True, True]
    assert sum(row["outcome"] == "passed" for row in sections["tests"]["rows"]) > 20
    assert " ms" not in done.stdout  # times of a CPU are no figures


WORKER = """
import os, sys, time
from gpu_rows import run_cases

def work(case):
    kind = case["kind"]
    if kind == "exit":
        os._exit(3)
    if kind == "hang":
        time.sleep(600)
    if kind == "error":
        raise ValueError("no such\\nthing")
    return {"seconds": 1.0, "loss": float("nan")}

run_cases([{"kind": k} for k in ("good", "exit", "good", "hang", "error", "good", "exit")], work)
"""


def follow(gpu: ModuleType, folder: Path, script: str, monkeypatch: Any) -> dict[str, Any]:
    """The section `head` of a kit whose worker is this script."""
    (folder / "worker.py").write_text(script)
    monkeypatch.setattr(gpu, "CASE_LIMIT_S", 3)
    kit = gpu.Kit(folder / "out", dry=False)
    kit.run("head", [[sys.executable, str(folder / "worker.py")]], folder)
    section: dict[str, Any] = json.loads((folder / "out" / "gpu.json").read_text())["sections"]
    return section["head"]


def test_a_case_that_breaks_its_process_does_not_end_the_others(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = follow(gpu, tmp_path, WORKER, monkeypatch)
    assert section["status"] == "ok"
    assert section["left_out"] == 0
    good = {"kind": "good", "seconds": 1.0, "loss": None}
    assert section["rows"] == [
        good,
        {"kind": "exit", "error": "the process ended with status 3"},
        good,
        {"kind": "hang", "error": "no result within 3 s"},
        {"kind": "error", "error": "ValueError: no such thing"},
        good,
        {"kind": "exit", "error": "the process ended with status 3"},
    ]


def test_a_section_that_cannot_start_says_so(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = follow(gpu, tmp_path, "import nothing_of_this_name", monkeypatch)
    assert section["status"] == "failed"
    assert section["error"] == "the process ended with status 1, see gpu.log"
    assert "nothing_of_this_name" in (tmp_path / "out" / "gpu.log").read_text()


def test_without_a_card_it_says_so(tmp_path: Path) -> None:
    """Instead of times of a CPU that look like those of a card."""
    done = subprocess.run(
        ["bash", str(BENCHMARKS / "gpu.sh"), "--only", "head", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    for name in ("machine", "head"):
        assert sections[name]["status"] == "failed"
    assert "no CUDA device: --dry runs on a CPU" in done.stdout


def test_a_section_stops_at_its_limit(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gpu.LIMITS, "head", 4)
    slow = WORKER.replace("os._exit(3)", "time.sleep(2.5)")
    section = follow(gpu, tmp_path, slow, monkeypatch)
    assert section["status"] == "out of time"
    assert section["left_out"] > 0
    assert section["rows"][0]["kind"] == "good"


def test_an_unknown_section_is_refused(gpu: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no section heads, only install, machine, tests"):
        gpu.chosen("heads")
    assert list(gpu.chosen("step")) == ["install", "machine", "step"]


def test_all_limits_together_are_below_eight_minutes(gpu: ModuleType) -> None:
    assert sum(gpu.LIMITS.values()) < 8 * 60


def test_ratios_are_those_of_the_same_case(gpu: ModuleType) -> None:
    case = {"dtype": "bfloat16", "vocab": 1000, "targets": 10, "width": 8, "copy_gb_s": 1.0}
    rows = [
        case | {"variant": "ours", "seconds": 3e-3},
        case | {"variant": "floor", "seconds": 2e-3},
        case | {"variant": "trl", "error": "out of memory"},
        case | {"variant": "ours", "seconds": 3e-3, "width": 16},
    ]
    ours, _, failed, other = gpu.with_ratios(rows)
    assert ours["times_products"] == 1.5
    assert ours["excess_bytes_per_logit"] == 100.0  # 1 ms at 1 GB/s for 10,000 logits
    assert "times_products" not in failed
    assert "times_products" not in other


def test_the_kit_names_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_kit

    wanted = [
        Requirement("torch>=2.6"),  # the machine has it
        Requirement("colorama; sys_platform == 'win32'"),
        Requirement("faiss; extra == 'index'"),
        Requirement("Tokenizers<0.24"),
        Requirement("safetensors>=0.9"),
        Requirement("tqdm"),
    ]
    held = {"tokenizers": "0.23.3", "safetensors": "0.8.0"}
    assert gpu_kit.unmet((("this", requirement) for requirement in wanted), held) == [
        "this needs safetensors>=0.9, but the kit has 0.8.0",
        "this needs tqdm, which is not in the kit",
    ]
    pinned = gpu_kit.versions(gpu_kit.NAMES.split())  # every name has a version
    assert any(pin.startswith("transformers==") for pin in pinned)
    with pytest.raises(SystemExit, match=r"no version in constraints.txt for no-such-package"):
        gpu_kit.versions(["no-such-package"])
