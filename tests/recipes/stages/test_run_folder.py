"""A run folder belongs to one recipe, and to one run at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock

from hf_distill.errors import InputError
from hf_distill.recipes import Recipe, load_recipe, parse_recipe
from hf_distill.recipes.stages import open_run
from hf_distill.recipes.stages.run_folder import recipe_of
from hf_distill.recipes.stages.stage import write_whole

TEXT = "name: tiny\nteacher: t\nstudent: {layers: every_other}\ndata: {train: a.txt}\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "recipes" / "tiny.yaml"
    path.parent.mkdir()
    path.write_text(TEXT + f"output_dir: {tmp_path / 'runs'}\n")
    return path


def finish_a_stage(folder: Path) -> None:
    write_whole(folder / "work" / "prepare.json", "{}")


def start(source: Path, *overrides: str, finish: bool = True) -> None:
    with open_run(load_recipe(source, overrides), source) as run:
        if finish:
            finish_a_stage(run.folder)


def test_the_resolved_recipe_is_kept(source: Path, tmp_path: Path) -> None:
    start(source, "train.alpha=0.25")
    kept: Recipe = parse_recipe((tmp_path / "runs/tiny/recipe.yaml").read_text())
    assert kept.resolved()["train"]["alpha"] == 0.25
    assert recipe_of(tmp_path / "runs/tiny") == kept
    with pytest.raises(InputError, match=r"is not a run folder, since it has no recipe\.yaml"):
        recipe_of(tmp_path)


def test_the_same_file_may_change(source: Path) -> None:
    start(source)
    start(source, "train.alpha=0.25")
    source.write_text(source.read_text() + "seed: 7\n")
    start(source)
    assert recipe_of(source.parents[1] / "runs/tiny").seed == 7


def test_another_file_is_refused_unless_it_says_the_same(source: Path, tmp_path: Path) -> None:
    start(source)
    other = tmp_path / "other.yaml"
    other.write_text(source.read_text())
    start(other)  # moved, or copied
    other.write_text(source.read_text() + "seed: 7\n")
    start(other)  # it is this file's folder now
    with pytest.raises(InputError, match=r"holds a run of another recipe \(.*other\.yaml"):
        start(source)


def test_a_run_folder_and_its_recipe_may_move_together(source: Path, tmp_path: Path) -> None:
    source.write_text(TEXT + "output_dir: runs\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        start(source)
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        for name in ("runs", "recipes"):
            (tmp_path / name).rename(elsewhere / name)
        patch.chdir(elsewhere)
        start(elsewhere / "recipes/tiny.yaml", "seed=7")
        assert recipe_of(elsewhere / "runs/tiny").seed == 7


def test_a_folder_with_other_files_is_left_alone(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="is not a run folder, but has files in it"):
        start(source)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    (folder / "thesis.txt").unlink()
    start(source)


def test_a_file_in_the_place_of_the_folder(source: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/tiny").write_text("")
    with pytest.raises(InputError, match="is a file"):
        start(source)


def test_accelerate_may_have_started_fewer_processes(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start(source)
    assert "note: " not in capsys.readouterr().out
    monkeypatch.setenv("MASTER_PORT", "29500")  # as by accelerate launch --cpu --num_processes 2
    start(source)
    assert "note: accelerate has started one process" in capsys.readouterr().out


def test_two_runs_at_once(source: Path, tmp_path: Path) -> None:
    with (
        open_run(load_recipe(source), source) as run,
        pytest.raises(InputError, match="another run is using"),
        open_run(load_recipe(source), source),
    ):
        raise AssertionError("the second run was let in")
    FileLock(run.folder / ".lock").acquire(timeout=0)  # free again


def test_bad_input_leaves_no_folder_but_keeps_results(source: Path, tmp_path: Path) -> None:
    def fail(*, late: bool) -> None:
        with pytest.raises(InputError, match="bad"), open_run(load_recipe(source), source) as run:
            if late:
                finish_a_stage(run.folder)
            raise InputError("bad")

    fail(late=False)
    assert not (tmp_path / "runs/tiny").exists()
    fail(late=True)
    assert (tmp_path / "runs/tiny/work/prepare.json").exists()
    fail(late=False)  # nor is a folder removed that was there before
    assert (tmp_path / "runs/tiny/work/prepare.json").exists()
    with pytest.raises(InputError, match=r"^train: alpha is 2\.0"):
        start(source, "train.alpha=2.0", "name=new")
    assert not (tmp_path / "runs/new").exists()
