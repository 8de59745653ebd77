"""Runs stages: what has not changed is skipped, what was interrupted goes on.

A stage makes its result in `work/<stage>/`, it is moved to its final name when it is whole, and
then a stamp, `work/<stage>.json`, says from which inputs it was made. A kill at any instant leaves
either the old result or a stage that is done again, from its last whole checkpoint.
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
from rich.console import Console
from rich.table import Table

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

    doing: what the line that announces it says
    result: the file or folder that it makes in the run folder
    reads: the part of the recipe, and of the files outside, that decides the result
    after: the stages whose results it uses
    make: called with the run and the path to make the result at; on all processes where
        `everywhere` is True, otherwise on the main process alone
    wanted: whether the recipe has this stage; without it an earlier result is left alone
    keeps: parts of a result that were whole before it was, and are gone on from after a kill
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
            run.say(f"{self.name}: not in this recipe, skipped")
            return
        work = run.folder / "work" / self.name
        fingerprint = run.from_main(lambda: run.fingerprint(self))
        if run.from_main(lambda: run.is_made(self)):
            run.from_main(lambda: remove(work))  # what a kill just before the end has left
            run.say(f"{self.name}: unchanged, skipped")
            return
        if (other := run.from_main(lambda: run.same_elsewhere(self))) is not None:
            run.from_main(lambda: _take_over(run, self, other, fingerprint))
            run.say(f"{self.name}: made from the same inputs in {other.name}, shared")
            return
        run.say(f"{self.name}: {self.doing}")
        engine = f"{run.state.distributed_type.value} x {run.state.num_processes}"
        inputs = {"fingerprint": fingerprint, "engine": engine}
        run.from_main(lambda: _begin(work, inputs, self.keeps))
        if self.everywhere:
            self.make(run, work / "result")
            run.state.wait_for_everyone()
        else:
            run.from_main(lambda: self.make(run, work / "result"))
        give_back_memory()
        run.from_main(lambda: _finish(run, self, fingerprint, time.perf_counter() - start))
        run.say(f"{self.name}: done in {time.perf_counter() - start:.0f} s")


class Run:
    """One recipe and its run folder, seen from one of its processes."""

    def __init__(self, recipe: Recipe, share_with: Path | None = None) -> None:
        """share_with: a folder of other runs, whose results are taken over where they serve"""
        self.recipe = recipe
        self.folder = Path(recipe.output_dir) / recipe.name
        self.share_with = share_with
        self._fingerprints: dict[str, str] = {}

    @cached_property
    def state(self) -> PartialState:
        """The processes of this run; made when first asked for, since it may start their group."""
        # The main process may clean and tokenize for long while the others wait for it.
        patience = timedelta(hours=12)
        deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
        # Without being told, several processes on CPUs would not know of each other.
        cpu = not deepspeed and not torch.accelerator.is_available()
        cpu = cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
        return PartialState(cpu=cpu, timeout=patience)

    def say(self, text: str) -> None:
        """One line to the terminal, once."""
        if self.state.is_main_process:
            print(text, flush=True)

    def show(self, table: Table) -> None:
        """A table to the terminal, once; as wide as it is where there is no terminal."""
        if self.state.is_main_process:
            Console(width=None if sys.stdout.isatty() else 120).print(table)

    def from_main(self, action: Callable[[], T]) -> T:
        """What an action returns on the main process, on all of them; an error ends all of them."""
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
        """Is the stage's result there, made from what the recipe says now?"""
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
    """What a JSON file holds; None where there is none, or none that is whole."""
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
    """An empty working folder, or what an interrupted run with the same inputs left in it.

    Other numbers of processes draw other batches, and engines cannot read each other's
    checkpoints: these begin anew.
    """
    if read_json(work / "begun.json") != inputs:
        remove(work)
        work.mkdir(parents=True)
        write_whole(work / "begun.json", json.dumps(inputs))
    for part in keeps:
        if (work / "result" / part).exists():
            (work / "result" / part).rename(work / part)
    remove(work / "result")


def _take_over(run: Run, stage: Stage, other: Path, fingerprint: str) -> None:
    """The result of another run, as hard links: whoever changes a file later replaces it."""
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
    remove(stamp)  # first, so that it never speaks for a result that it was not made with
    remove(result)
    (work / "result").rename(result)
    write_whole(stamp, json.dumps({"fingerprint": fingerprint, "seconds": round(seconds, 1)}))
    remove(work)
