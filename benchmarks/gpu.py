"""Run the GPU kit, section by section, and keep what is known at every moment in gpu.json.

    bash benchmarks/gpu.sh                      all sections
    bash benchmarks/gpu.sh --only tests,head    some of them; `install` and `machine` always run
    bash benchmarks/gpu.sh --dry                on a CPU with tiny sizes, to see that it works

install   wheels of .gpu-kit into a temporary folder that comes first on PYTHONPATH
machine   card, driver, versions, rates of a copy and of matrix products
tests     tests/gpu, in as many processes as there are files or cores
head      the output head beside other libraries
step      whole optimizer steps beside other trainers

A section has a time limit and is a process of its own, as is what is left of it after a case that
crashed or did not end. The exit status is 0 if all sections had their turn, also if one failed:
gpu.json says so. This file needs the standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, TextIO

from gpu_rows import START_AGAIN
from gpu_tables import with_ratios, write_tables

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
KIT = ROOT / ".gpu-kit"
# Seconds. With the time that it takes to end processes they stay below 8 minutes.
LIMITS = {"install": 40, "machine": 30, "tests": 140, "head": 130, "step": 120}
# A case that takes longer is ended, so that the others have their turn.
CASE_LIMIT_S = 60
# A dry run has no limit to keep, and may share its processor with other work.
DRY_PATIENCE = 4
SECTIONS = list(LIMITS)


@dataclass
class Worker:
    """One process at a time that runs the cases of a section and reports them as rows."""

    command: list[str]
    environment: dict[str, str]
    rows_file: Path
    log: TextIO
    case_limit_s: float
    total: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    finished: bool = False
    open_case: dict[str, Any] | None = None
    last: int = -1
    process: subprocess.Popen[bytes] | None = None

    def start(self, case: int = 0) -> None:
        self.rows_file.unlink(missing_ok=True)
        self.read, self.heard = 0, time.monotonic()
        self.process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env=self.environment | {"GPU_ROWS": str(self.rows_file), "GPU_START": str(case)},
            stdout=self.log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def stop(self) -> None:
        """End the process and those that it started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def look(self) -> bool:
        """Take in new rows, start again where a case broke the process; whether rows came."""
        assert self.process is not None
        ended = self.process.poll()
        came = self._take_in()
        if ended is not None:
            self._after(ended)
        elif self.open_case is not None and time.monotonic() - self.heard > self.case_limit_s:
            self.stop()
            self._go_on(f"no result within {self.case_limit_s:g} s")
            came = True
        return came

    def _take_in(self) -> bool:
        text = self.rows_file.read_text() if self.rows_file.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()
        new, self.read = lines[self.read :], len(lines)
        for line in new:
            self.heard, row = time.monotonic(), json.loads(line)
            if "cases" in row:
                self.total = row["cases"]
            elif "start" in row:
                self.open_case = row
            else:
                self.open_case, self.last = None, row.pop("done")
                self.rows.append(row)
        return bool(new)

    def _after(self, status: int) -> None:
        if self.open_case is not None:
            self._go_on(f"the process ended with status {status}")
        elif status == START_AGAIN and self.last + 1 < self.total:
            self.start(self.last + 1)
        else:
            self.finished = True
            if len(self.rows) < self.total or not self.total:
                self.error = f"the process ended with status {status}, see gpu.log"

    def _go_on(self, reason: str) -> None:
        """Note that the open case has no result, and start again after it."""
        assert self.open_case is not None
        case, self.open_case = self.open_case, None
        number = case.pop("start")
        outcome = {"outcome": "failed"} if "test" in case else {}
        self.rows.append({**case, **outcome, "error": reason})
        if number + 1 < self.total:
            self.start(number + 1)
        else:
            self.finished = True


class Kit:
    """The run: its result so far, and where it is written."""

    def __init__(self, out: Path, dry: bool) -> None:
        self.out, self.dry, self.began = out, dry, time.monotonic()
        out.mkdir(parents=True, exist_ok=True)
        self.log = (out / "gpu.log").open("w")
        self.result: dict[str, Any] = {"dry": dry, "finished": False, "seconds": 0.0, "machine": {}}
        self.result["sections"] = {}
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
        }
        if dry:
            self.environment |= {
                "HF_DISTILL_GPU_DRY": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",
                "TRITON_INTERPRET": "1",
                "TORCH_COMPILE_DISABLE": "1",  # compiling takes longer than all the rest
            }

    def save(self) -> None:
        self.result["seconds"] = round(time.monotonic() - self.began, 1)
        new = self.out / "gpu.json.new"
        new.write_text(json.dumps(self.result, indent=1) + "\n")
        new.replace(self.out / "gpu.json")

    def say(self, line: str) -> None:
        print(line, flush=True)
        print(f"==== {line}", file=self.log, flush=True)

    def name_the_checkout(self, folder: Path) -> None:
        """State the version of hf-distill, which is imported from here, where it is not installed.

        Recordings keep it, and look for it among the installed packages.
        """
        if next(distributions(name="hf-distill"), None) is None:
            text = (ROOT / "pyproject.toml").read_text()
            (version,) = re.findall(r'^version = "(.+)"$', text, re.MULTILINE)
            place = folder / f"hf_distill-{version}.dist-info"
            place.mkdir(parents=True)
            lines = ["Metadata-Version: 2.1", "Name: hf-distill", f"Version: {version}", ""]
            (place / "METADATA").write_text("\n".join(lines))
            self.environment["PYTHONPATH"] += f"{os.pathsep}{folder}"

    def install(self, folder: Path) -> None:
        """Wheels into a folder that the later sections import from first."""
        section = self.result["sections"]["install"] = {"limit_s": LIMITS["install"]}
        wheels = sorted(map(str, KIT.glob("*.whl")))
        if self.dry or not wheels:
            reason = "a dry run" if self.dry else "no wheels in .gpu-kit: see make gpu-kit"
            section |= {"status": "skipped", "reason": reason, "seconds": 0.0}
            return
        start = time.monotonic()
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        command += ["--no-compile", "--no-cache-dir", "--target", str(folder), *wheels]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=LIMITS["install"]
            )
            error = done.stderr.strip()[-500:] if done.returncode else None
            self.log.write(done.stdout + done.stderr)
        except subprocess.TimeoutExpired:
            error = "out of time"
        section |= {"status": "failed" if error else "ok", "wheels": len(wheels)}
        section |= {"seconds": round(time.monotonic() - start, 1)} | (
            {"error": error} if error else {}
        )
        self.environment["PYTHONPATH"] = f"{folder}{os.pathsep}{self.environment['PYTHONPATH']}"

    def run(self, name: str, commands: list[list[str]], folder: Path) -> None:
        """Run the commands of a section side by side, until they end or its time is over."""
        patience = DRY_PATIENCE if self.dry else 1
        limit_s, case_limit_s = patience * LIMITS[name], patience * CASE_LIMIT_S
        section = self.result["sections"][name] = {"limit_s": limit_s, "status": "running"}
        start = time.monotonic()
        workers = [
            Worker(command, self.environment, folder / f"{name}-{n}.rows", self.log, case_limit_s)
            for n, command in enumerate(commands)
        ]
        try:
            for worker in workers:
                worker.start()
            while True:
                changed = [worker.look() for worker in workers if not worker.finished]
                late = time.monotonic() - start > limit_s
                over = late or all(worker.finished for worker in workers)
                if any(changed) or over:
                    section["seconds"] = round(time.monotonic() - start, 1)
                    section["rows"] = with_ratios([row for w in workers for row in w.rows])
                    self.save()
                if over:
                    break
                time.sleep(0.1)
        finally:
            for worker in workers:
                worker.stop()
        section |= self._outcome(workers, late and not all(w.finished for w in workers))
        if name == "machine" and section["rows"]:
            self.result["machine"] = section["rows"][0]
            if "error" in self.result["machine"]:
                section |= {"status": "failed", "error": self.result["machine"]["error"]}
        self.save()

    @staticmethod
    def _outcome(workers: list[Worker], late: bool) -> dict[str, Any]:
        rows = [row for worker in workers for row in worker.rows]
        errors = [worker.error for worker in workers if worker.error]
        if failed := [row["test"] for row in rows if row.get("outcome") == "failed"]:
            errors.append(f"{len(failed)} tests failed, the first {failed[0]}")
        left_out = sum(worker.total for worker in workers) - len(rows)
        status = "failed" if errors else "out of time" if late else "ok"
        found = {"status": status, "cases": len(rows), "left_out": left_out}
        return found | ({"error": "; ".join(errors)} if errors else {})


def commands(name: str) -> list[list[str]]:
    python = sys.executable
    if name != "tests":
        return [[python, str(HERE / f"gpu_{name}.py")]]
    files = sorted(map(str, (ROOT / "tests" / "gpu").glob("test_*.py")))
    words = ["-q", "-m", "gpu", "-p", "gpu_pytest", "-p", "no:cacheprovider"]
    beside = min(len(files), os.cpu_count() or 1)
    return [[python, "-m", "pytest", *words, *files[n::beside]] for n in range(beside)]


def chosen(only: str | None) -> Iterator[str]:
    names = SECTIONS if only is None else [*SECTIONS[:2], *only.split(",")]
    if unknown := set(names) - set(SECTIONS):
        raise SystemExit(f"no section {', '.join(sorted(unknown))}, only {', '.join(SECTIONS)}")
    return (name for name in SECTIONS if name in names)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry", action="store_true", help="on a CPU, with tiny sizes")
    parser.add_argument("--out", type=Path, help="folder for gpu.json and gpu.log")
    parser.add_argument("--only", help="sections, separated by commas")
    options = parser.parse_args()
    names = list(chosen(options.only))
    kit = Kit(options.out or Path(os.environ.get("OUT") or "."), options.dry)
    # Ended from outside, it ends what it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="gpu-kit-") as temporary:
        folder = Path(temporary)
        kit.name_the_checkout(folder / "checkout")
        for name in names:
            kit.say(name)
            if name == "install":
                kit.install(folder / "site")
            else:
                kit.run(name, commands(name), folder)
    kit.result["finished"] = True
    kit.save()
    write_tables(kit.result)


if __name__ == "__main__":
    main()
