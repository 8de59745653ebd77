"""The run folder: locked by one run, and owned by one recipe."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from hf_distill.errors import InputError
from hf_distill.recipes import Recipe, dump_recipe, parse_recipe
from hf_distill.recipes.stages.inputs import check_arguments
from hf_distill.recipes.stages.order import evaluate
from hf_distill.recipes.stages.stage import Run, read_json, remove, write_whole

LOCK = ".lock"


@contextmanager
def open_run(recipe: Recipe, source: str | Path, share_with: Path | None = None) -> Iterator[Run]:
    """The run of a recipe, its folder locked against a second run, the resolved recipe in it.

    source: the recipe's file, by which a later run knows that the folder is its own
    share_with: a folder of other runs; see `Run`
    raises: InputError if the folder is another recipe's, holds something else, or is in use. A
        folder that stayed without results, because the first stage found bad input, is removed.
    """
    run = Run(recipe, share_with)
    assert run.state  # first, so that its timeout is the process group's
    _tell_of_missing_processes(run)
    check_arguments(recipe)
    lock = FileLock(run.folder / LOCK)
    earlier = run.from_main(lambda: _claim(run, Path(source), lock))
    # On the main process alone, which may write while others still read.
    results = run.state.is_main_process and _results(run.folder)
    try:
        yield run
        run.from_main(lambda: _note_complete(run))
    except InputError:
        if run.state.is_main_process and _results(run.folder) == results:
            _give_back(run.folder, earlier)
        raise
    finally:
        lock.release()


def _tell_of_missing_processes(run: Run) -> None:
    """One line where `accelerate launch --cpu --num_processes 2` has started a single process.

    It sets a port for two processes, but without MPI starts one only, and gives no message.
    """
    if (
        "MASTER_PORT" in os.environ
        and "WORLD_SIZE" not in os.environ
        and run.state.num_processes == 1
    ):
        run.log(
            "note: accelerate has started one process only; for several processes on CPUs use "
            "`accelerate launch --config_file recipes/accelerate/cpu2.yaml`"
        )


def _claim(run: Run, source: Path, lock: FileLock) -> dict[str, str | None] | None:
    """Take the folder; returns what `recipe.yaml` and the like said before, None in a new one."""
    folder = run.folder
    try:
        present = {path.name for path in folder.iterdir()} - {LOCK}
    except FileNotFoundError:
        present = set()
    except NotADirectoryError:
        raise InputError(f"{str(folder)!r} is a file, so no run can be kept there") from None
    if present and "recipe.yaml" not in present:
        raise InputError(
            f"{str(folder)!r} is not a run folder, but has files in it: "
            "change 'name' or 'output_dir', or empty it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"another run is using {str(folder)!r}: wait for it, or change 'name'"
        ) from None
    text = dump_recipe(run.recipe)
    # Relative to the folder, so that both may be moved together.
    origin = os.path.relpath(source.resolve(), folder.resolve())
    _refuse_another(folder, text, origin)
    (folder / "work").mkdir(exist_ok=True)
    written = {
        "work/run.json": json.dumps({"recipe": origin, "complete": False}),
        "recipe.yaml": text,
    }
    earlier = {name: _read(folder / name) for name in written} if present else None
    for name, content in written.items():
        write_whole(folder / name, content)
    return earlier


def _note_complete(run: Run) -> None:
    """Write down that the metrics are those of `recipe.yaml`, for comparisons of runs."""
    if run.is_made(evaluate):
        path = run.folder / "work" / "run.json"
        write_whole(path, json.dumps({**read_json(path), "complete": True}))


def _give_back(folder: Path, earlier: dict[str, str | None] | None) -> None:
    """After a run that was refused before it had a result: the folder as it was found."""
    if earlier is None:
        remove(folder)
        return
    for name, content in earlier.items():
        if content is None:
            remove(folder / name)
        else:
            write_whole(folder / name, content)


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _refuse_another(folder: Path, text: str, origin: str) -> None:
    """InputError where the folder holds a run of another recipe file with other settings."""
    kept = folder / "recipe.yaml"
    earlier = (read_json(folder / "work" / "run.json") or {}).get("recipe", origin)
    if kept.exists() and earlier != origin and kept.read_text(encoding="utf-8") != text:
        raise InputError(
            f"{str(folder)!r} holds a run of another recipe ({earlier} from that folder): "
            "change 'name' or 'output_dir', or remove that folder"
        )


def _results(folder: Path) -> dict[Path, int]:
    """The stamps of stages and the checkpoints of trainings, and when they came."""
    stamps = set((folder / "work").glob("*.json")) - {folder / "work" / "run.json"}
    found = stamps | set((folder / "work").glob("*/checkpoints/checkpoint-*"))
    return {path: path.stat().st_mtime_ns for path in found}


def recipe_of(folder: str | Path) -> Recipe:
    """The recipe of a run folder, as it was resolved."""
    path = Path(folder) / "recipe.yaml"
    if not path.is_file():
        raise InputError(
            f"{str(folder)!r} is not a run folder, since it has no recipe.yaml: give a folder made "
            "by `hf-distill run`, such as runs/quickstart"
        )
    return parse_recipe(path.read_text(encoding="utf-8"))
