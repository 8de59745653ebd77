"""Run stages: skip those whose inputs have not changed, resume those that were interrupted.

A stage writes its result into `work/<stage>/`. The result is moved to its final name when it is
complete; then a stamp, `work/<stage>.json`, records its inputs. After a kill at any time, either
the old result is there, or the stage runs again from its last complete checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from rich.console import Console, RenderableType

from hf_distill import __version__
from hf_distill.errors import InputError
from hf_distill.evaluation.performance import give_back_memory
from hf_distill.recipes import Recipe

T = TypeVar("T")

# Reports name their own run.
NEVER_SHARED = ("report",)


@dataclass(frozen=True)
class Stage:
    """One step of a run, called with the run.

    doing: description of the work, for the log
    result: the file or folder that it makes in the run folder
    reads: the part of the recipe, and of the files outside, that decides the result
    after: the stages whose results it uses
    make: called with the run and the path to make the result at; on all processes where
        `everywhere` is True, otherwise on the main process alone
    wanted: whether the recipe has this stage; if not, an earlier result stays
    keeps: parts of a result from which an interrupted stage resumes
    """

    name: str
    doing: str
    result: str
    reads: Callable[[Recipe], Any]
    after: tuple[Stage, ...]
    make: Callable[[Run, Path], None]
    everywhere: bool = False
    wanted: Callable[[Recipe], bool] = lambda recipe: True
    keeps: tuple[str, ...] = ()

    def __call__(self, run: Run) -> None:
        """Make the result, unless it is there already, made from the same inputs."""
        start = time.perf_counter()
        if not self.wanted(run.recipe):
            run.log(f"{self.name}: not in this recipe, skipped")
            return
        work = run.folder / "work" / self.name
        fingerprint = run.from_main(lambda: run.fingerprint(self))
        if run.from_main(lambda: run.is_made(self)):
            run.from_main(lambda: remove(work))  # left over by a kill just before the end
            run.log(f"{self.name}: unchanged, skipped")
            return
        if (other := run.from_main(lambda: run.same_elsewhere(self))) is not None:
            run.from_main(lambda: _take_over(run, self, other, fingerprint))
            run.log(f"{self.name}: made from the same inputs in {other.name}, shared")
            return
        run.log(f"{self.name}: {self.doing}")
        run.from_main(lambda: _begin(work, self.inputs(run.state, fingerprint), self.keeps))
        if self.everywhere:
            self.make(run, work / "result")
            run.state.wait_for_everyone()
        else:
            run.from_main(lambda: self.make(run, work / "result"))
        give_back_memory()
        run.from_main(lambda: _finish(run, self, fingerprint, time.perf_counter() - start))
        run.log(f"{self.name}: done in {time.perf_counter() - start:.0f} s")

    def inputs(self, state: PartialState, fingerprint: str) -> dict[str, str]:
        """All that an unfinished result depends on.

        Another number of processes draws other batches, and engines cannot read each other's
        checkpoints. Files that a stage keeps (`keeps`) depend on neither.
        """
        engine = f"{state.distributed_type.value} x {state.num_processes}"
        return {"fingerprint": fingerprint} | ({} if self.keeps else {"engine": engine})


class Run:
    """One recipe and its run folder, seen from one of its processes."""

    def __init__(self, recipe: Recipe, share_with: Path | None = None) -> None:
        """share_with: a folder of other runs, from which results with the same inputs are taken"""
        self.recipe = recipe
        self.folder = Path(recipe.output_dir) / recipe.name
        self.share_with = share_with
        self._fingerprints: dict[str, str] = {}

    @cached_property
    def state(self) -> PartialState:
        """The processes of this run. Made on first use, since it may start their group."""
        # The others may wait long while the main process cleans and tokenizes.
        patience = timedelta(hours=12)
        deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
        # Without `cpu`, several processes on CPUs would not find each other.
        cpu = not deepspeed and not torch.accelerator.is_available()
        cpu = cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
        return PartialState(cpu=cpu, timeout=patience)

    def log(self, text: str) -> None:
        """One line to the terminal, once."""
        if self.state.is_main_process:
            print(text, flush=True)

    def show(self, table: RenderableType) -> None:
        """A table or a text to the terminal, once; as wide as it is where there is no terminal."""
        if self.state.is_main_process:
            Console(width=None if sys.stdout.isatty() else 120).print(table)

    def from_main(self, action: Callable[[], T]) -> T:
        """Run an action on the main process and return its value on all; an error ends all."""
        value: Any = None
        error: BaseException | None = None
        if self.state.is_main_process:
            try:
                value = action()
            except BaseException as raised:
                error = raised
        message = None if error is None else str(error) or type(error).__name__
        # Also on failure: the others must not wait for a process that is about to end.
        value, message = broadcast_object_list([value, message])
        if error is not None:
            raise error
        if message is not None:
            raise InputError(message)
        return value

    def fingerprint(self, stage: Stage) -> str:
        """Changes when anything that decides the stage's result changes."""
        if stage.name not in self._fingerprints:
            before = [self.fingerprint(other) for other in stage.after if other.wanted(self.recipe)]
            inputs = [__version__, stage.name, stage.reads(self.recipe), before]
            text = json.dumps(inputs, sort_keys=True)
            self._fingerprints[stage.name] = hashlib.sha256(text.encode()).hexdigest()
        return self._fingerprints[stage.name]

    def is_made(self, stage: Stage) -> bool:
        """Whether the result exists and was made from the inputs of the current recipe."""
        stamp = read_json(stamp_of(self, stage)) or {}
        exists = (self.folder / stage.result).exists()
        return exists and stamp.get("fingerprint") == self.fingerprint(stage)

    def same_elsewhere(self, stage: Stage) -> Path | None:
        """Another run's folder that has this stage's result, made from the same inputs."""
        if self.share_with is None or stage.name in NEVER_SHARED:
            return None
        for folder in sorted(self.share_with.glob("*")):
            stamp = read_json(folder / "work" / f"{stage.name}.json") or {}
            same = stamp.get("fingerprint") == self.fingerprint(stage)
            if same and folder != self.folder and (folder / stage.result).exists():
                return folder
        return None


def stamp_of(run: Run, stage: Stage) -> Path:
    """The file that says from which inputs the stage's result was made."""
    return run.folder / "work" / f"{stage.name}.json"


def write_whole(path: Path, text: str) -> None:
    """A text file that appears under its name only when it is whole."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def read_json(path: Path) -> Any:
    """The content of a JSON file; None if it is missing or incomplete."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _begin(work: Path, inputs: dict[str, str], keeps: tuple[str, ...]) -> None:
    """Make an empty working folder, or keep that of an interrupted run with the same inputs."""
    if read_json(work / "begun.json") != inputs:
        remove(work)
        work.mkdir(parents=True)
        write_whole(work / "begun.json", json.dumps(inputs))
    for part in keeps:
        if (work / "result" / part).exists():
            (work / "result" / part).rename(work / part)
    remove(work / "result")


def _take_over(run: Run, stage: Stage, other: Path, fingerprint: str) -> None:
    """Take the result of another run as hard links. Writers replace files, never change them."""
    work, source = run.folder / "work" / stage.name, other / stage.result
    remove(work)
    work.mkdir(parents=True)
    if source.is_dir():
        shutil.copytree(source, work / "result", copy_function=_link)
    else:
        _link(source, work / "result")
    _finish(run, stage, fingerprint, 0.0)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        shutil.copy2(source, target)


def _finish(run: Run, stage: Stage, fingerprint: str, seconds: float) -> None:
    result, work = run.folder / stage.result, run.folder / "work" / stage.name
    stamp = stamp_of(run, stage)
    remove(stamp)  # first, so that it never belongs to another result
    remove(result)
    (work / "result").rename(result)
    write_whole(stamp, json.dumps({"fingerprint": fingerprint, "seconds": round(seconds, 1)}))
    remove(work)
