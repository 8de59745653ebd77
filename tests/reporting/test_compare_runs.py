"""Several runs on one page: groups, differing keys, spread, and what is left out."""

from __future__ import annotations

import io
import json
import math
import re
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from example_run import MODELS, RECIPE
from rich.console import Console
from run_setup import invoke

from hf_distill.errors import InputError
from hf_distill.reporting import plots
from hf_distill.reporting.compare_runs import result_rows, terminal_table, write_comparison
from hf_distill.reporting.formatting import BY_KEY
from hf_distill.reporting.runs import find_runs, group_runs, short_names


def make_run(folder: Path, perplexity: float | None, **settings: Any) -> Path:
    """A run folder with a student of that perplexity; None for an unfinished one.

    settings: overrides of the recipe, with two underscores for the dot of a key
    """
    recipe = yaml.safe_load(RECIPE) | {"name": folder.name, "output_dir": str(folder.parent)}
    for key, value in settings.items():
        section, _, name = key.rpartition("__")
        (recipe[section] if section else recipe)[name] = value
    (folder / "student").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if perplexity is None:
        return folder
    models = {role: dict(figures) for role, figures in MODELS.items()}
    models["student"]["perplexity"] = perplexity
    (folder / "metrics.json").write_text(json.dumps(models))
    history = [
        {"step": step, "loss": 4.0, "ce": 5.0, "forward_kl": 0.2, "eval_loss": 3.0,
         "eval_ce": perplexity / 20 - step / 200, "eval_forward_kl": 0.3 - step / 2000}
        for step in (50, 100, 150)
    ]  # fmt: skip
    (folder / "student" / "log_history.json").write_text(json.dumps(history))
    return folder


VALUES = {1.0: (100.0, 104.0, 99.0), 2.0: (90.5, 93.0, 91.0)}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for temperature, perplexities in VALUES.items():
        for seed, perplexity in enumerate(perplexities):
            folder = tmp_path / f"t{temperature:g}-s{seed}"
            make_run(folder, perplexity, seed=seed, train__temperature=temperature)
    make_run(tmp_path / "going-on", None)
    (tmp_path / "notes.txt").write_text("not a run")
    return tmp_path


def page_of(places: list[Path], path: Path) -> str:
    return write_comparison(places, path)[0].read_text()


def rows_of(page: str) -> list[list[str]]:
    """The cells of every table row, as text."""
    found = re.findall(r"<tr.*?</tr>", page, re.DOTALL)
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL) for row in found]
    return [[" ".join(re.sub("<[^>]*>", " ", c).split()) for c in row] for row in cells]


# ---- Groups ----


def test_runs_that_differ_in_the_seed_form_a_group(runs: Path) -> None:
    found, unfinished = find_runs([runs])
    assert [folder.name for folder in unfinished] == ["going-on"]
    keys, groups = group_runs(found)
    assert keys == ["train.temperature"]
    assert [(g.letter, g.label) for g in groups] == [("A", "temperature=1"), ("B", "temperature=2")]
    for group, values in zip(groups, VALUES.values(), strict=True):
        assert group.values("student", "perplexity") == list(values)
        assert group.mean("student", "perplexity") == pytest.approx(statistics.mean(values))


def test_groups_are_in_the_order_of_their_values(tmp_path: Path) -> None:
    for value in (10.0, 2.0, 1.0):
        make_run(tmp_path / f"t{value:g}", 100.0, train__temperature=value)
    _, groups = group_runs(find_runs([tmp_path])[0])
    assert [group.label for group in groups] == [f"temperature={n}" for n in (1, 2, 10)]


def test_only_keys_that_differ(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 100.0, train__alpha=0.1, record=None, teacher={"model": "t", "kw": {}})
    make_run(tmp_path / "b", 90.0, train__alpha=0.9, data__max_length=128, teacher={"model": "t"})
    keys, groups = group_runs(find_runs([tmp_path / "a", tmp_path / "b"])[0])
    assert keys == ["data.max_length", "train.alpha"]
    assert groups[0].label == "max_length=128, alpha=0.9"


def test_many_differing_keys_are_listed_below_each_other(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 100.0)
    many = {f"train__key_{number}": number for number in range(8)}
    make_run(tmp_path / "b", 90.0, **many)
    _, groups = group_runs(find_runs([tmp_path])[0])
    assert {group.label for group in groups} == {"a", "b"}
    rows = rows_of(page_of([tmp_path], tmp_path / "x.html"))
    assert ["train.key_7", "7", "none"] in rows


def test_short_names() -> None:
    keys = ["train.temperature", "teacher.train.max_steps", "train.max_steps", "seed"]
    assert short_names(keys) == {
        "train.temperature": "temperature",
        "teacher.train.max_steps": "teacher.train.max_steps",
        "train.max_steps": "train.max_steps",
        "seed": "seed",
    }


# ---- Mean and spread ----


def test_mean_and_standard_deviation() -> None:
    perplexity, agreement = BY_KEY["perplexity"], BY_KEY["top1_agreement"]
    for values in (*VALUES.values(), (2.01, 2.05, 2.03), (38_000.0, 39_500.0), (0.2172, 0.2199)):
        mean, spread = map(float, perplexity.mean_text(values).replace(",", "").split(" ± "))
        assert mean == pytest.approx(statistics.mean(values), rel=1e-3)
        assert spread == pytest.approx(statistics.stdev(values), rel=0.05)
    assert perplexity.mean_text([90.5, 93.0, 91.0]) == "91.5 ± 1.3"
    assert perplexity.mean_text([2.0, 2.0000001]) == "2.0000 ± 0.0000"
    assert agreement.mean_text([0.5, 0.52]) == "51.0 ± 1.4%"
    for figure, value in ((perplexity, 88.0), (agreement, 0.5)):
        assert figure.mean_text([value]) == figure.mean_text([value, value]) == figure.text(value)
    assert perplexity.mean_text([]) == "–"


def test_a_single_run_has_no_spread(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 100.0)
    make_run(tmp_path / "b", 90.0, train__alpha=0.9)
    assert "±" not in page_of([tmp_path], tmp_path / "x.html")


def test_curves_are_means_over_the_runs() -> None:
    histories = [
        [{"step": s, "eval_ce": value} for s, value in zip((1, 2, 3), values, strict=True)]
        for values in ((5.0, 4.0, 3.5), (5.5, 4.2, math.nan))
    ]
    curve = plots.mean_curve([*histories, [{"step": 1, "loss": 1.0}]], "eval_ce")
    assert [step for step, _, _ in curve] == [1, 2], "steps that both have"
    for (_, mean, spread), values in zip(curve, ((5.0, 5.5), (4.0, 4.2)), strict=True):
        assert mean == pytest.approx(statistics.mean(values))
        assert spread == pytest.approx(statistics.stdev(values))


# ---- The page ----


def test_the_page(runs: Path) -> None:
    page = page_of([runs], runs / "compare.html")
    assert "<script" not in page
    assert "default-src 'none'" in page
    assert page.count("<svg") == 3  # cross-entropy, divergence, loss
    assert "going-on" in page
    assert "thin line: training rows" in page
    identifiers = re.findall(r'id="([^"]+)"', page)
    assert len(set(identifiers)) == len(identifiers)
    assert {f"var(--line-{n})" for n in (0, 1)} <= set(re.findall(r"var\(--line-\d+\)", page))
    assert not re.search(r"#0b0b\d\d", page), "no fixed colours"
    rows = rows_of(page)
    assert ["A", "1", "3", "0, 1, 2"] in rows
    (first,) = (row for row in rows if row[0] == "A temperature=1" and "±" in row[1])
    assert first[1] == f"{statistics.mean(VALUES[1.0]):.1f} ± {statistics.stdev(VALUES[1.0]):.1f}"
    assert 'class="best">91.5 ± 1.3<' in page


def test_baselines_and_teachers_that_agree_are_shown_once(runs: Path) -> None:
    _, groups = group_runs(find_runs([runs])[0])
    rows = [(row.role, [g.letter for g in row.groups]) for row in result_rows(groups)]
    assert rows == [
        ("student", ["A"]), ("student", ["B"]), ("baseline", ["A", "B"]), ("teacher", ["A", "B"]),
    ]  # fmt: skip
    path = runs / "t2-s0" / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["baseline"]["perplexity"] = 1.0
    path.write_text(json.dumps(metrics))
    page = rows_of(page_of([runs], runs / "compare.html"))
    assert {"Baseline of A", "Baseline of B", "Teacher"} <= {row[0] for row in page if row}


def test_twelve_groups_have_lines_of_their_own(tmp_path: Path) -> None:
    for number in range(13):
        make_run(tmp_path / f"{number:02}", 100.0 + number, train__alpha=number / 20)
    page = page_of([tmp_path], tmp_path / "x.html")
    svg = page[page.index("<svg") : page.index("</svg>")]
    assert len(set(re.findall(r"stroke: var\(--line-(\d+)\)", svg))) == plots.LINES
    letters = re.findall(r">\s*([A-Z])\s*</text>", svg)
    assert sorted(letters) == sorted("ABCDEFGHIJKLM")
    heights = sorted(float(y) for y in re.findall(r'y="([\d.]+)"[^>]*>\s*[A-M]\s*</text>', svg))
    assert len(heights) == 13
    assert min(b - a for a, b in pairwise(heights)) > 8, "none overlap"
    assert "thin line" not in page


def test_text_of_a_recipe_cannot_break_out(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 100.0, train__note="<script>alert(1)</script>")
    make_run(tmp_path / "b", 90.0)
    page = page_of([tmp_path], tmp_path / "x.html")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_what_does_not_compare_is_said(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 100.0)
    make_run(tmp_path / "b", 90.0, data__max_length=128)
    assert "The groups differ in data or tokenizer" in page_of([tmp_path], tmp_path / "x.html")
    path = tmp_path / "b" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"machine": {"processor": "other"}}))
    assert "on different machines" in page_of([tmp_path], tmp_path / "x.html")


# ---- The command ----


def test_the_command(runs: Path) -> None:
    done = invoke("report", *sorted(runs.iterdir()))
    assert done.exit_code == 0
    assert "left out, because they are not finished: going-on" in done.output
    assert done.stdout.strip() == str(runs / "compare.html")
    assert invoke("report", runs, "--output", runs / "new" / "other.html").exit_code == 0
    assert (runs / "new" / "other.html").exists()
    assert invoke("report", runs / "t1-s0", runs / "t1-s1").stdout == f"{runs / 'compare.html'}\n"


def test_one_run_has_its_own_report(runs: Path) -> None:
    alone = invoke("report", runs / "t1-s0")
    assert (alone.exit_code, alone.stdout) == (0, f"{runs / 't1-s0' / 'report.html'}\n")
    elsewhere = invoke("report", runs / "t1-s0", "--output", runs / "mine.html")
    assert (elsewhere.exit_code, elsewhere.stdout) == (0, f"{runs / 'mine.html'}\n")
    assert (runs / "mine.html").read_text() == (runs / "t1-s0" / "report.html").read_text()


def test_a_folder_that_does_not_exist_is_refused(runs: Path) -> None:
    done = invoke("report", runs / "t1-s0", runs / "t1-s9")
    assert done.exit_code == 2
    assert "t1-s9' is not a folder" in done.output


@pytest.mark.parametrize("place", ["empty", "nothing-here", "unfinished"])
def test_nothing_to_compare(place: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "unfinished" / "a", None)
    with pytest.raises(InputError, match="no run folder|is not a folder|none of the 1 runs"):
        write_comparison([tmp_path / place], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_a_broken_file_is_named(runs: Path) -> None:
    (runs / "t1-s0" / "student" / "log_history.json").write_text('[{"step": 1')
    with pytest.raises(InputError, match=r"log_history.json' is not whole"):
        write_comparison([runs], runs / "x.html")


def test_a_run_that_goes_on_with_other_settings_is_left_out(runs: Path) -> None:
    """Its recipe.yaml is new already, while its metrics are those of the earlier settings."""
    (runs / "t1-s0" / "work").mkdir()
    (runs / "t1-s0" / "work" / "run.json").write_text('{"recipe": "x", "complete": false}')
    found, unfinished = find_runs([runs])
    assert "t1-s0" in [folder.name for folder in unfinished]
    assert len(found) == 5


def test_the_terminal_table(runs: Path) -> None:
    _, groups = group_runs(find_runs([runs])[0])
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal_table(groups))
    lines = [line.split() for line in console.export_text().splitlines() if line.strip()]
    assert lines[0] == ["runs", "Perplexity", "KL", "Agreement"]
    assert ["B", "temperature=2", "3", "91.5", "±", "1.3", "0.2187", "73.4%"] in lines
    assert ["baseline", "3", "105.9", "0.4812", "62.1%"] in lines
    assert all(len(line) <= 80 for line in console.export_text().splitlines())
