"""What students have written in their training, in the report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from example_run import log_history, make_run

from hf_distill.reporting.report import write_report
from hf_distill.reporting.written import LONGEST, MOST_SAMPLES, written_in_training

HOSTILE = "</pre><script>alert('&\"')</script>"


def history(steps: int = 200, text: str = "a text") -> list[dict[str, Any]]:
    """A log of a training in which the student has written in each step."""
    found: list[dict[str, Any]] = []
    for step in range(10, steps + 1, 10):
        entry = {"step": step, "loss": 1.0 / step, "written_tokens": 20 + step / 10}
        entry |= {"written_cut": 0.5, "written_repetition": 0.1, "written_distinct": 0.8}
        entry |= {"written_agreement": 0.6, "written_log_prob": -2.0 - 1 / step}
        entry |= {"written_teacher_log_prob": -3.0 + step / 200, "written_reverse_kl": 1 / step}
        entry |= {"writing_seconds": 3.0, "judging_seconds": 1.0, "learning_seconds": 2.0}
        found.append(entry)
        if step % 20 == 0:
            sample = {"written_prompt": f"prompt {step}", "written_text": f"{text} {step}"}
            found.append({"step": step, **sample})
    return found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = make_run(tmp_path / "run")
    (folder / "student" / "log_history.json").write_text(json.dumps(history()))
    return folder


def words(svg: str) -> str:
    return " ".join(" ".join(ElementTree.fromstring(svg).itertext()).split())


def test_the_report_has_texts_and_curves(run: Path) -> None:
    html = write_report(run).read_text()
    section = html[html.index('<section id="written">') :]
    section = section[: section.index("</section>")]
    assert "Step 200, prompt" in section
    assert "<pre>\na text 200</pre>" in section
    titles = re.findall(r'aria-label="([^"]*) over the optimizer steps"', section)
    assert "Mean length of the texts (tokens)" in titles
    assert "Reverse KL (nats per target), own text" in titles
    assert "Seconds since the entry before" in titles
    assert len(titles) == 8
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_samples_are_spread_over_the_training() -> None:
    samples = written_in_training({"student": history(2000)})["samples"]
    assert len(samples) == MOST_SAMPLES
    steps = [sample["step"] for sample in samples]
    assert (steps[0], steps[-1]) == (20, 2000)
    assert steps == sorted(set(steps))
    few = written_in_training({"student": history(60)})["samples"]
    assert [sample["step"] for sample in few] == [20, 40, 60]


def test_long_texts_are_cut_where_least_is_lost() -> None:
    entry = {"step": 1, "written_prompt": "b" * 5000 + "end", "written_text": "start" + "b" * 5000}
    (sample,) = written_in_training({"student": [entry]})["samples"]
    assert sample["prompt"].startswith("…b")
    assert sample["prompt"].endswith("end")
    assert sample["text"].startswith("start")
    assert sample["text"].endswith("b…")
    assert len(sample["text"]) == LONGEST + 1


def test_hostile_text_stays_text(run: Path) -> None:
    entries = history(text=HOSTILE)
    for entry in entries:
        entry |= {"written_prompt": HOSTILE} if "written_text" in entry else {}
    (run / "student" / "log_history.json").write_text(json.dumps(entries))
    html = write_report(run).read_text()
    assert "<script" not in html.lower()
    assert html.count("alert(") == 2 * MOST_SAMPLES


def test_both_log_probabilities_are_named_in_one_plot() -> None:
    curves = written_in_training({"off_policy": log_history(True), "student": history()})["curves"]
    (svg,) = (svg for svg in curves if "Log-probability" in svg)
    assert words(svg).split().count("teacher") == 2  # the title and the line
    assert "stroke: var(--student)" in svg
    assert "stroke: var(--teacher)" in svg


def test_without_written_text_there_is_no_section(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert 'id="written"' not in write_report(folder).read_text()
    assert written_in_training({"student": log_history(True)}) == {"samples": [], "curves": []}
