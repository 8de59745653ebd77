"""Sweeps: which runs there are, what they share, and what is left after an interruption."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from run_setup import invoke, metrics, write_recipe
from typer.testing import Result

from hf_distill.errors import InputError
from hf_distill.recipes import load_recipe, sweep
from hf_distill.recipes.reading import split_values
from hf_distill.recipes.stages import order
from hf_distill.recipes.sweep import LONGEST_NAME, Point, plan_sweep, run_point

# ---- The grid ----


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,2,4", ["1", "2", "4"]),
        ("1", ["1"]),
        ("", [""]),
        ("[a, b]", ["[a, b]"]),
        ("[0, 2], every_other", ["[0, 2]", "every_other"]),
        ('"a,b",c', ['"a,b"', "c"]),
        ("{r: 4, alpha: 8},{r: 8}", ["{r: 4, alpha: 8}", "{r: 8}"]),
        ("{a: [1, 2], b: 3},null", ["{a: [1, 2], b: 3}", "null"]),
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
    names = [point.name for point in planned.points]
    assert names == [f"temperature-{t}_seed-{s}" for t in (1, 2) for s in (0, 1, 2)]
    for point in planned.points:
        found = load_recipe(recipe, point.overrides)
        name = f"temperature-{found.train.temperature:g}_seed-{found.seed}"  # type: ignore[attr-defined]
        assert (
            (found.name, found.output_dir)
            == (point.name, str(planned.folder))
            == (
                name,
                str(tmp_path / "runs" / "tiny-sweep"),
            )
        )
        assert found.train.alpha == 0.7  # type: ignore[attr-defined]


def test_overrides_keep_their_order(tmp_path: Path) -> None:
    """Later ones win, as in a run: here a section and then a key in it."""
    options = ["student.layers=[0],[1]", "student.config=null", "student.lora.r=2"]
    planned = plan_sweep(write_recipe(tmp_path), options)
    assert [point.overrides[:3] for point in planned.points] == [
        ("student.layers=[0]", *options[1:]), ("student.layers=[1]", *options[1:]),
    ]  # fmt: skip
    again = plan_sweep(write_recipe(tmp_path), ["seed=7", "seed=1,2"])
    assert [point.overrides[0] for point in again.points] == ["seed=1", "seed=2"]


def test_names_are_short_unique_and_safe(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    values = ["a/*.txt", "a*txt", "ü ö", "x" * 300, "y" * 300]
    planned = plan_sweep(recipe, [f"data.train={','.join(values)}"])
    names = [point.name for point in planned.points]
    assert len(set(names)) == len(values)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)
        assert len(name) <= LONGEST_NAME
    fewer = plan_sweep(recipe, [f"data.train={','.join(values[-2:])}"])
    assert [point.name for point in fewer.points] == names[-2:], "names do not depend on the rest"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=1"], "no key has several values"),
        ([], "no key has several values"),
        (["seed=1,1"], "have the same settings: give each value once"),
        (["train.alpha=0.5, 0.50"], "have the same settings"),
        (["train.alpha=0.5,x"], "train.alpha is 'x'"),
        (["train.alhpa=1,2"], "unknown key 'train.alhpa'"),
        (["seed=0,1", "train.alpha"], "not of the form key=value"),
        (["name=a,b"], "--set name has several values"),
        (["seed=0,1", "output_dir=a,b"], "--set output_dir has several values"),
    ],
)
def test_refused(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        plan_sweep(write_recipe(tmp_path), overrides)
    assert not (tmp_path / "runs").exists()


def test_refused_under_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="cannot run under `accelerate launch`"):
        plan_sweep(write_recipe(tmp_path), ["seed=0,1"])


# ---- Several values outside a sweep ----


@pytest.mark.parametrize(
    "override",
    [
        "train.alpha=0.1,0.2",
        "train.divergence=forward_kl,jsd",
        "seed=0,1",
        "data.train=a.txt,b.txt",
    ],
)
def test_several_values_in_a_run_name_the_sweep(override: str, tmp_path: Path) -> None:
    done = invoke("run", write_recipe(tmp_path), "--set", override)
    assert done.exit_code == 2
    key, _, values = override.partition("=")
    assert f"--set {key} has several values, {values}: a run takes one" in done.output
    assert "hf-distill sweep" in done.output


def test_lists_and_quoted_commas_are_one_value(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    found = load_recipe(recipe, ["data.train=[a.txt, b.txt]", "train.run_name='one, two'"])
    assert found.data.train == ["a.txt", "b.txt"]
    assert found.train.run_name == "one, two"  # type: ignore[attr-defined]


# ---- Runs ----


@dataclass
class Started:
    """The runs of sweeps, in this process, which has everything imported; `stop` ends one."""

    results: list[Result] = field(default_factory=list)
    made: list[tuple[str, str]] = field(default_factory=list)  # (run, stage) of every real stage
    stop: tuple[str, str] | None = None  # before this stage of this run, by Ctrl-C

    def run_point(self, recipe: Path, point: Point, share_with: Path) -> int:
        words = [word for override in point.overrides for word in ("--set", override)]
        self.results.append(invoke("run", recipe, *words, "--share-with", share_with))
        return self.results[-1].exit_code

    def begin(self, work: Path, *rest: Any) -> None:
        if (work.parents[1].name, work.name) == self.stop:
            raise KeyboardInterrupt
        self.made.append((work.parents[1].name, work.name))
        self.really_begin(work, *rest)

    def really_begin(self, *_: Any) -> None:
        raise NotImplementedError


@pytest.fixture(scope="module")
def started() -> Iterator[Started]:
    started = Started()
    with pytest.MonkeyPatch.context() as patch:
        started.really_begin = order.Stage.__call__.__globals__["_begin"]  # type: ignore[method-assign]
        patch.setattr("hf_distill.recipes.stages.stage._begin", started.begin)
        patch.setattr(sweep, "run_point", started.run_point)
        yield started


OPTIONS = ["train.temperature=1,2", "train.max_steps=4", "teacher.train.max_steps=4"]
FIRST, SECOND = "temperature-1", "temperature-2"
ALL = ("prepare", "teacher", "student", "baseline", "train", "evaluate", "report")


def start(recipe: Path) -> Result:
    options = [*OPTIONS, f"output_dir={recipe.parent}/runs"]
    return invoke("sweep", recipe, *(word for o in options for word in ("--set", o)))


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, started: Started) -> tuple[Path, list[Result]]:
    """A sweep that is interrupted in its second run, and then started twice again."""
    folder = tmp_path_factory.mktemp("sweep")
    recipe = write_recipe(folder)
    started.stop = (SECOND, "train")
    interrupted = start(recipe)
    started.stop = None
    return folder / "runs" / "tiny-sweep", [interrupted, start(recipe), start(recipe)]


def test_stages_that_agree_are_made_once(swept: Any, started: Started) -> None:
    folder, (_, finished, again) = swept
    assert finished.exit_code == 0, finished.output
    assert started.made == [
        *((FIRST, stage) for stage in ALL),
        *((SECOND, stage) for stage in ("train", "evaluate", "report")),
    ]
    second = started.results[1].output
    assert re.findall(rf"^(\w+): made from the same inputs in {FIRST}, shared$", second, re.M) == [
        "prepare", "teacher", "student", "baseline",
    ]  # fmt: skip
    one, two = (metrics(folder / name) for name in (FIRST, SECOND))
    assert one["baseline"]["perplexity"] == two["baseline"]["perplexity"]
    assert one["student"]["perplexity"] != two["student"]["perplexity"]
    assert again.exit_code == 0


def test_an_interrupted_sweep_goes_on(swept: Any, started: Started) -> None:
    folder, (interrupted, finished, _) = swept
    assert interrupted.exit_code == 2
    assert f"the run {SECOND!r} ended with exit code 130" in interrupted.output
    assert "the same command continues" in interrupted.output
    of_first, of_second = (result.output for result in started.results[2:4])
    assert of_first.count("unchanged, skipped") == len(ALL)
    assert of_second.count("unchanged, skipped") == 4
    assert str(folder / "compare.html") in finished.output.replace("\n", "")
    assert re.search(r"A  temperature=1 +1 +[\d.,]+ +[\d.]+ +[\d.]+%", finished.output)
    assert re.search(r"^ baseline +1 ", finished.output, re.M)


def test_a_run_of_a_sweep_is_as_one_alone(swept: Any, tmp_path: Path) -> None:
    folder, _ = swept
    recipe = write_recipe(tmp_path)
    text = recipe.read_text().replace(str(tmp_path / "text"), str(folder.parents[1] / "text"))
    recipe.write_text(text)
    options = ["train.temperature=2", *OPTIONS[1:], f"output_dir={tmp_path}/runs"]
    done = invoke("run", recipe, *(word for o in options for word in ("--set", o)))
    assert done.exit_code == 0, done.output
    found, expected = (metrics(f) for f in (folder / SECOND, tmp_path / "runs" / "tiny"))
    for role in ("teacher", "baseline", "student"):
        assert found[role]["perplexity"] == expected[role]["perplexity"]


def test_shared_results_are_links_and_stay_as_they_are(swept: Any) -> None:
    folder, _ = swept
    one, two = (folder / name / "teacher" / "model.safetensors" for name in (FIRST, SECOND))
    assert one.samefile(two)
    stamp = json.loads((folder / SECOND / "work" / "baseline.json").read_text())
    assert stamp["seconds"] == 0.0
    cards = [(folder / name / "student" / "README.md").read_text() for name in (FIRST, SECOND)]
    assert cards[0] != cards[1]
    # A student that is shared has a card of its own: the report replaces the file.
    before = cards[0]
    words = ["evaluate.prompts=1", "train.temperature=1", *OPTIONS[1:], "name=third"]
    words += [f"output_dir={folder}"]
    recipe = folder.parents[1] / "tiny.yaml"
    done = invoke(
        "run", recipe, *(word for o in words for word in ("--set", o)), "--share-with", folder
    )
    assert f"train: made from the same inputs in {FIRST}, shared" in done.output
    assert (folder / FIRST / "student" / "README.md").read_text() == before
    assert "# third" in (folder / "third" / "student" / "README.md").read_text()


def test_a_failed_run_ends_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = iter([0, 2])
    monkeypatch.setattr(sweep, "run_point", lambda *_: next(codes))
    done = invoke("sweep", write_recipe(tmp_path), "--set", "seed=0,1,2")
    assert done.exit_code == 2
    assert "error: the run 'seed-1' ended with exit code 2: results made so far" in done.output


def test_a_run_is_a_process_of_its_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    options = ("data.train=none/*.txt", "name=bad", f"output_dir={tmp_path}/runs")
    assert run_point(recipe, Point("bad", options), tmp_path / "runs") == 2
    assert capfd.readouterr().err.startswith("error: 'none/*.txt' matches no file")
