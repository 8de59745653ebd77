"""Several runs on one page: groups, differing keys, spread, and what is left out."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml
from example_run import MODELS, RECIPE
from run_setup import invoke

from hf_distill.errors import InputError
from hf_distill.reporting.compare_runs import write_comparison
from hf_distill.reporting.runs import find_runs, group_runs, groups_table, short_names


def make_run(folder: Path, perplexity: float | None, **settings: Any) -> Path:
    """A run folder with a student of that perplexity; None for an unfinished one."""
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
         "eval_ce": 5 - step / 200, "eval_forward_kl": 0.3 - step / 2000}
        for step in (50, 100, 150)
    ]  # fmt: skip
    (folder / "student" / "log_history.json").write_text(json.dumps(history))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for temperature, perplexities in {1.0: (100.0, 104.0, 99.0), 2.0: (90.5, 93.0, 91.0)}.items():
        for seed, perplexity in enumerate(perplexities):
            folder = tmp_path / f"t{temperature:g}-s{seed}"
            make_run(folder, perplexity, seed=seed, train__temperature=temperature)
    make_run(tmp_path / "going-on", None)
    (tmp_path / "notes.txt").write_text("not a run")
    return tmp_path


def test_groups_and_spread(runs: Path) -> None:
    found, unfinished = find_runs([runs])
    assert [folder.name for folder in unfinished] == ["going-on"]
    keys, groups = group_runs(found)
    assert keys == ["train.temperature"]
    assert [group.label for group in groups] == ["temperature=1", "temperature=2"]
    values = (90.5, 93.0, 91.0)
    assert groups[1].mean("student", "perplexity") == pytest.approx(statistics.mean(values))
    spread = statistics.stdev(values)
    page, _ = write_comparison([runs], runs / "compare.html")
    assert f"{statistics.mean(values):.2f} ± {spread:.2g}" in page.read_text()


def test_a_single_run_has_no_spread(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 100.0, train__alpha=0.1)
    make_run(tmp_path / "b", 90.0, train__alpha=0.9, data__max_length=128)
    found, _ = find_runs([tmp_path / "a", tmp_path / "b"])
    keys, groups = group_runs(found)
    assert keys == ["data.max_length", "train.alpha"]
    assert groups[1].label == "max_length=128, alpha=0.9"
    page = write_comparison([tmp_path], tmp_path / "x.html")[0].read_text()
    assert "±" not in page


def test_the_page(runs: Path) -> None:
    page = write_comparison([runs], runs / "compare.html")[0].read_text()
    assert "<script" not in page
    assert "default-src 'none'" in page
    assert page.count("<svg") == 3  # CE, divergence, objective
    assert page.count('class="best"') >= 1
    assert "going-on" in page
    assert 'title="train.temperature"' in page
    identifiers = re.findall(r'id="([^"]+)"', page)
    assert len(set(identifiers)) == len(identifiers)
    assert {f"var(--line-{n})" for n in (0, 1)} <= set(re.findall(r"var\(--line-\d+\)", page))
    assert not re.search(r"#0b0b\d\d", page)


def test_text_of_a_recipe_cannot_break_out(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 100.0, train__note="<script>alert(1)</script>")
    make_run(tmp_path / "b", 90.0)
    page = write_comparison([tmp_path], tmp_path / "x.html")[0].read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_short_names() -> None:
    keys = ["train.temperature", "teacher.train.max_steps", "train.max_steps", "seed"]
    assert short_names(keys) == {
        "train.temperature": "temperature",
        "teacher.train.max_steps": "teacher.train.max_steps",
        "train.max_steps": "train.max_steps",
        "seed": "seed",
    }


def test_the_command(runs: Path) -> None:
    done = invoke("report", *sorted(runs.iterdir()))
    assert done.exit_code == 0
    assert "left out, since they are not finished: going-on" in done.output
    assert (runs / "compare.html").exists()
    assert invoke("report", runs, "--output", runs / "other.html").exit_code == 0
    assert (runs / "other.html").exists()
    alone = invoke("report", runs / "t1-s0")
    assert alone.exit_code == 0
    assert (runs / "t1-s0" / "report.html").exists()


@pytest.mark.parametrize("place", ["empty", "nothing-here", "unfinished"])
def test_nothing_to_compare(place: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "unfinished" / "a", None)
    with pytest.raises(InputError, match="no run folder|is not a folder|none of them finished"):
        write_comparison([tmp_path / place], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_the_terminal_table(runs: Path) -> None:
    _, groups = group_runs(find_runs([runs])[0])
    table = groups_table(groups)
    assert table.row_count == 2
    assert len(table.columns) == 2 + 3 * 2  # baseline and student for each figure
