"""Stages are made once, made again when their inputs change, and whole after a kill anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import DistributedType

from hf_distill.errors import InputError
from hf_distill.recipes import Recipe, parse_recipe
from hf_distill.recipes.stages import order
from hf_distill.recipes.stages import stage as engine
from hf_distill.recipes.stages.stage import Run, Stage

TEXT = """
name: tiny
data: {{train: a.txt, max_length: {max_length}}}
teacher: {{model: some-teacher}}
student: {{layers: every_other}}
baseline: {baseline}
evaluate: {{prompts: {prompts}}}
"""


def recipe(folder: Path, max_length: int = 8, prompts: int = 1, baseline: bool = True) -> Recipe:
    text = TEXT.format(max_length=max_length, prompts=prompts, baseline=str(baseline).lower())
    return parse_recipe(text + f"output_dir: {folder}\n")


class Killed(BaseException):
    """What no stage may catch."""


class Chain:
    """first (max_length) -> second (prompts) -> third; what each makes says what it was made of."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.first = Stage(
            "first", "…", "first", lambda r: r.data.max_length, (), self.make("first")
        )
        self.second = Stage(
            "second", "…", "second.txt", lambda r: r.evaluate.prompts, (self.first,), self.write
        )
        self.third = Stage(
            "third",
            "…",
            "third",
            lambda r: None,
            (self.second,),
            self.make("third"),
            everywhere=True,
            wanted=lambda r: r.baseline,
        )

    def make(self, name: str) -> Callable[[Run, Path], None]:
        def make(run: Run, result: Path) -> None:
            self.made.append(name)
            result.mkdir()
            (result / "of.txt").write_text(f"{run.recipe.data.max_length}")
            (result / "more.txt").write_text("more")

        return make

    def write(self, run: Run, result: Path) -> None:
        self.made.append("second")
        of = (run.folder / "first" / "of.txt").read_text()
        result.write_text(f"{of} {run.recipe.evaluate.prompts}")

    def run(self, recipe: Recipe) -> list[str]:
        """Run all three; returns the names of those that were made."""
        self.made.clear()
        run = Run(recipe)
        run.folder.mkdir(parents=True, exist_ok=True)
        for stage in (self.first, self.second, self.third):
            stage(run)
        return list(self.made)


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in (folder / "tiny").rglob("*") if path.is_file()]
    stamped = {"first.json", "second.json", "third.json"}
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in files
        if path.name not in stamped
    }


def test_made_once_and_again_when_the_inputs_change(tmp_path: Path, capsys: Any) -> None:
    chain = Chain()
    assert chain.run(recipe(tmp_path)) == ["first", "second", "third"]
    assert (tmp_path / "tiny/second.txt").read_text() == "8 1"
    capsys.readouterr()
    assert chain.run(recipe(tmp_path)) == []
    assert capsys.readouterr().out.splitlines() == [
        f"{name}: unchanged, skipped" for name in ("first", "second", "third")
    ]
    assert chain.run(recipe(tmp_path, prompts=2)) == ["second", "third"]
    assert chain.run(recipe(tmp_path, max_length=9)) == ["first", "second", "third"]
    assert (tmp_path / "tiny/second.txt").read_text() == "9 1"


def test_a_result_that_was_deleted_is_made_again(tmp_path: Path) -> None:
    chain = Chain()
    chain.run(recipe(tmp_path))
    (tmp_path / "tiny/second.txt").unlink()
    assert chain.run(recipe(tmp_path)) == ["second"]


def test_another_version_of_the_library_makes_all_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = Chain()
    chain.run(recipe(tmp_path))
    monkeypatch.setattr(engine, "__version__", "99")
    assert chain.run(recipe(tmp_path)) == ["first", "second", "third"]


def test_an_unwanted_stage_keeps_what_it_has_made(tmp_path: Path, capsys: Any) -> None:
    """A command that lacks an option must not cost hours of recording."""
    chain = Chain()
    chain.run(recipe(tmp_path))
    before = contents(tmp_path)
    assert chain.run(recipe(tmp_path, baseline=False)) == []
    assert contents(tmp_path) == before
    assert "third: not in this recipe, skipped" in capsys.readouterr().out
    assert chain.run(recipe(tmp_path)) == []


def test_parts_that_were_whole_are_gone_on_from(tmp_path: Path) -> None:
    """A kill between moving the parts into a result and the result to its place."""
    begun, work = {"fingerprint": "a"}, tmp_path / "work"
    engine._begin(work, begun, ("train",))
    (work / "result" / "train").mkdir(parents=True)
    (work / "result" / "rest").write_text("half")
    engine._begin(work, begun, ("train",))
    assert (work / "train").is_dir()
    assert not (work / "result").exists()
    engine._begin(work, {"fingerprint": "b"}, ("train",))
    assert not (work / "train").exists()


def test_a_stage_that_fails_keeps_the_old_result_and_shows_no_half(tmp_path: Path) -> None:
    chain = Chain()
    chain.run(recipe(tmp_path))

    def fail(run: Run, result: Path) -> None:
        result.write_text("half")
        raise InputError("no")

    good, chain.second = chain.second, Stage(**{**vars(chain.second), "make": fail})
    with pytest.raises(InputError, match="^no$"):
        chain.run(recipe(tmp_path, prompts=2))
    assert (tmp_path / "tiny/second.txt").read_text() == "8 1"
    chain.second = good
    assert chain.run(recipe(tmp_path, prompts=2)) == ["second", "third"]


@pytest.mark.parametrize("then", ["the same", "the earlier one"])
def test_killed_anywhere_and_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    """Killed at the n-th touch of the disk, for every n, the next run ends as if alone."""
    monkeypatch.setattr(engine, "give_back_memory", lambda: None)  # half a second each time
    earlier, later = {"max_length": 5}, {"prompts": 3}
    following = later if then == "the same" else earlier
    Chain().run(recipe(tmp_path / "alone", **following))
    expected = contents(tmp_path / "alone")
    n = 0
    while True:
        folder = tmp_path / str(n)
        Chain().run(recipe(folder, **earlier))
        with monkeypatch.context() as patch:
            left = [n]
            patch.setattr(engine, "remove", killing(engine.remove, left))
            for name in ("rename", "replace"):
                patch.setattr(Path, name, killing(getattr(Path, name), left))
            patch.setattr(Path, "write_text", killing_half_way(left))
            try:
                Chain().run(recipe(folder, **later))
                break
            except Killed:
                pass
        # What is there is whole, and of either run.
        for name in ("first/more.txt", "second.txt"):
            path = folder / "tiny" / name
            assert not path.exists() or path.read_text() in ("more", "8 3", "5 1")
        Chain().run(recipe(folder, **following))
        assert contents(folder) == expected
        assert Chain().run(recipe(folder, **following)) == []
        n += 1
    assert n > 20


def killing(action: Callable[..., Any], left: list[int]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return action(*args, **kwargs)

    return wrapped


def killing_half_way(left: list[int]) -> Callable[..., Any]:
    write_text = Path.write_text

    def wrapped(path: Path, text: str, **kwargs: Any) -> Any:
        if left[0] == 0:
            write_text(path, text[: len(text) // 2], **kwargs)
        return killing(write_text, left)(path, text, **kwargs)

    return wrapped


def test_checkpoints_survive_an_interruption_but_not_other_inputs(tmp_path: Path) -> None:
    seen: list[bool] = []

    def make(run: Run, result: Path) -> None:
        checkpoint = result.parent / "checkpoints"
        seen.append(checkpoint.exists())
        checkpoint.mkdir(exist_ok=True)
        if len(seen) < 4:
            raise Killed
        result.mkdir()

    stage = Stage("only", "…", "only", lambda r: r.data.max_length, (), make)
    for max_length in (8, 8, 9):
        with pytest.raises(Killed):
            stage(Run(recipe(tmp_path, max_length=max_length)))
    assert seen == [False, True, False]
    begun = tmp_path / "tiny/work/only/begun.json"
    begun.write_text(json.dumps(json.loads(begun.read_text()) | {"engine": "MULTI_CPU x 7"}))
    stage(Run(recipe(tmp_path, max_length=9)))
    assert seen == [False, True, False, False]  # another engine cannot read those checkpoints


def test_what_the_main_process_finds_goes_to_all(tmp_path: Path) -> None:
    run = Run(recipe(tmp_path))
    assert run.from_main(lambda: {"a": 1}) == {"a": 1}
    error = InputError("mend it")
    with pytest.raises(InputError) as raised:
        run.from_main(lambda: (_ for _ in ()).throw(error))
    assert raised.value is error  # with its traceback, for --debug


def test_kept_files_do_not_depend_on_the_processes() -> None:
    one, four = (
        SimpleNamespace(distributed_type=DistributedType.NO, num_processes=number)
        for number in (1, 4)
    )
    assert order.record.inputs(one, "a") == order.record.inputs(four, "a")
    assert order.annotate.inputs(one, "a") != order.annotate.inputs(one, "b")
    assert order.train.inputs(one, "a") != order.train.inputs(four, "a")
