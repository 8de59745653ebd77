"""Retention, gap closed, and the table for the terminal."""

from __future__ import annotations

import pytest
from rich.console import Console

from hf_distill.errors import InputError
from hf_distill.reporting.comparison import compare, results_table

TEACHER = {"perplexity": 20.0, "bits_per_byte": 1.0, "top1_agreement": 1.0, "kl_to_teacher": 0.0}
BASELINE = {"perplexity": 40.0, "bits_per_byte": 1.5, "top1_agreement": 0.6, "kl_to_teacher": 0.8}
STUDENT = {"perplexity": 25.0, "bits_per_byte": 1.25, "top1_agreement": 0.8, "kl_to_teacher": 0.2}


def test_retention_and_gap_closed() -> None:
    found = compare({"teacher": TEACHER, "baseline": BASELINE, "student": STUDENT})
    assert found["retention"] == pytest.approx(
        {"perplexity": 0.8, "bits_per_byte": 0.8, "top1_agreement": 0.8}
    )
    assert found["gap_closed"] == pytest.approx(
        {"perplexity": 0.75, "bits_per_byte": 0.5, "top1_agreement": 0.5, "kl_to_teacher": 0.75}
    )


def test_better_than_the_teacher_and_worse_than_the_baseline() -> None:
    better = compare({"teacher": TEACHER, "baseline": BASELINE, "student": {"perplexity": 10.0}})
    assert better == {"retention": {"perplexity": 2.0}, "gap_closed": {"perplexity": 1.5}}
    worse = compare({"teacher": TEACHER, "baseline": BASELINE, "student": {"top1_agreement": 0.5}})
    assert worse["gap_closed"] == pytest.approx({"top1_agreement": -0.25})


@pytest.mark.parametrize("baseline", [{}, {"perplexity": 20.0}, {"perplexity": 19.0}])
def test_no_gap_where_the_baseline_is_not_worse(baseline: dict[str, float]) -> None:
    found = compare({"teacher": TEACHER, "baseline": baseline, "student": STUDENT})
    assert "perplexity" not in found["gap_closed"]
    assert compare({"teacher": TEACHER, "student": STUDENT})["gap_closed"] == {}


def test_teacher_and_student_are_needed() -> None:
    with pytest.raises(InputError, match="no 'teacher', only 'student'"):
        compare({"student": STUDENT})
    with pytest.raises(InputError, match="no 'student', only 'teacher'"):
        compare({"teacher": TEACHER})


def test_table_shows_every_figure_once_and_fits_a_terminal() -> None:
    results = {
        "teacher": TEACHER | {"parameters": 2664576, "decode_tokens_per_s": 1234.5},
        "initial": BASELINE | {"perplexity": 4123.4},
        "baseline": BASELINE | {"train_seconds": 75.04},
        "student": STUDENT | {"gap": 0.5},
    }
    console = Console(width=80, record=True, file=None, force_terminal=False, quiet=False)
    with console.capture() as captured:
        console.print(results_table(results, compare(results)))
    text = captured.get()
    lines = text.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert "…" not in text
    for expected in ("4,123", "2.66M", "1,23", "75.04", "60.0%", "80.0%", "75.0%", "Gap"):
        assert expected in text
    header = next(line for line in lines if "teacher" in line)
    names = ["teacher", "initial", "baseline", "student", "retention", "gap closed"]
    assert [header.index(name) for name in names] == sorted(header.index(name) for name in names)
    assert "–" in text  # what was not measured of one model
    assert "Peak memory" not in text  # what was measured of none
