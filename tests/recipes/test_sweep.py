"""Sweeps: which runs there are, what they share, and what is left after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_setup import invoke, metrics, write_recipe

from hf_distill.errors import InputError
from hf_distill.recipes import sweep
from hf_distill.recipes.sweep import plan_sweep, split_values


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,2,4", ["1", "2", "4"]),
        ("1", ["1"]),
        ("[a, b]", ["[a, b]"]),
        ("[0, 2], every_other", ["[0, 2]", "every_other"]),
        ('"a,b",c', ['"a,b"', "c"]),
        ("{r: 4, alpha: 8},{r: 8}", ["{r: 4, alpha: 8}", "{r: 8}"]),
        ("'x, y'", ["'x, y'"]),
    ],
)
def test_values(text: str, values: list[str]) -> None:
    assert split_values(text) == values


def test_the_grid(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    planned = plan_sweep(
        recipe,
        ["train.temperature=1,2", "seed=0,1,2", "train.alpha=0.7", f"output_dir={tmp_path}/runs"],
    )
    assert planned.folder == tmp_path / "runs" / "tiny-sweep"
    assert len(planned.points) == 6
    assert planned.points[0].name == "temperature-1_seed-0"
    assert "train.alpha=0.7" in planned.points[0].overrides
    assert {p.overrides[2:4] for p in planned.points} == {
        (f"train.temperature={t}", f"seed={s}") for t in (1, 2) for s in (0, 1, 2)
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=1"], "no key has several values"),
        (["seed=1,1"], "--set seed has a value twice"),
        (["train.alpha=0.5,x"], "train.alpha is 'x'"),
        (["train.alhpa=1,2"], "unknown key 'train.alhpa'"),
        (["train.divergence=jsd, jsd "], "has a value twice"),
    ],
)
def test_refused(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        plan_sweep(write_recipe(tmp_path), overrides)
    assert not (tmp_path / "runs").exists()


def test_several_values_in_a_run_name_the_sweep(tmp_path: Path) -> None:
    done = invoke("run", write_recipe(tmp_path), "--set", "train.alpha=0.1,0.2")
    assert done.exit_code == 2
    assert "train.alpha is '0.1,0.2'" in done.output
    assert "hf-distill sweep" in done.output


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("sweep")
    recipe = write_recipe(folder)
    runs: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        # In this process, which has everything imported.
        def here(recipe: Path, point: Any, share_with: Path) -> int:
            words = [w for o in point.overrides for w in ("--set", o)]
            done = invoke("run", recipe, *words, "--share-with", share_with)
            runs.append(done)
            return done.exit_code

        patch.setattr(sweep, "run_point", here)
        options = ("--set", "train.temperature=1,2", "--set", "train.max_steps=4")
        done = invoke("sweep", recipe, *options, "--set", f"output_dir={folder}/runs")
        again = invoke("sweep", recipe, *options, "--set", f"output_dir={folder}/runs")
    assert done.exit_code == 0, done.output
    return folder / "runs" / "tiny-sweep", (runs, done, again)


def test_stages_that_agree_are_shared(swept: Any) -> None:
    folder, (runs, done, again) = swept
    shared = [line for line in runs[1].output.splitlines() if "shared" in line]
    assert [line.partition(":")[0] for line in shared] == [
        "prepare", "teacher", "student", "baseline",
    ]  # fmt: skip
    assert "shared" not in runs[0].output
    one, two = (metrics(folder / name) for name in ("temperature-1", "temperature-2"))
    assert one["baseline"]["perplexity"] == two["baseline"]["perplexity"]
    assert one["student"]["perplexity"] != two["student"]["perplexity"]
    assert str(folder / "compare.html") in done.output.replace("\n", "")
    assert again.exit_code == 0
    assert all("unchanged, skipped" in run.output for run in runs[2:])


def test_a_shared_run_is_as_one_alone(swept: Any, tmp_path: Path) -> None:
    folder, _ = swept
    recipe = write_recipe(tmp_path)
    text = recipe.read_text().replace(str(tmp_path / "text"), str(folder.parents[1] / "text"))
    recipe.write_text(text)
    done = invoke(
        "run", recipe, "--set", "train.temperature=2", "--set", "train.max_steps=4",
        "--set", f"output_dir={tmp_path}/runs",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found, expected = (metrics(f) for f in (folder / "temperature-2", tmp_path / "runs" / "tiny"))
    for role in ("teacher", "baseline", "student"):
        assert found[role]["perplexity"] == expected[role]["perplexity"]


def test_taken_over_results_are_not_changed_from_elsewhere(swept: Any) -> None:
    folder, _ = swept
    names = ("temperature-1", "temperature-2")
    one, two = (folder / name / "student" / "README.md" for name in names)
    assert one.read_text() != two.read_text()
    stamp = json.loads((folder / "temperature-2" / "work" / "baseline.json").read_text())
    assert stamp["seconds"] == 0.0


def test_a_failed_run_ends_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = iter([0, 2])
    monkeypatch.setattr(sweep, "run_point", lambda *_: next(codes))
    done = invoke("sweep", write_recipe(tmp_path), "--set", "seed=0,1,2")
    assert done.exit_code == 2
    assert "run 'seed-1' ended with exit code 2; the 1 runs before it are kept" in done.output
