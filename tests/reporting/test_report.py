"""The report of a run: what it shows, what it leaves out, and that it trusts no text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from example_run import METRICS, MODELS, log_history, make_run

from hf_distill.errors import InputError
from hf_distill.reporting import plots
from hf_distill.reporting.files import history_of_set
from hf_distill.reporting.formatting import compact, number
from hf_distill.reporting.report import write_report
from hf_distill.reporting.words import change_in_words, headline, names

Edit = Callable[[dict[str, Any]], None]
HOSTILE = "</pre><script>alert('&\"')</script>"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "quickstart")


def with_metrics(run: Path, edit: Edit) -> str:
    """The report after a change of the run's metrics."""
    metrics = json.loads((run / "metrics.json").read_text())
    edit(metrics)
    (run / "metrics.json").write_text(json.dumps(metrics))
    return write_report(run).read_text()


class Page(HTMLParser):
    """What a browser would see: tags in their order, ids, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def ids(self) -> list[str]:
        return [value for _, attributes in self.tags if (value := attributes.get("id"))]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def row(html: str, label: str) -> str:
    """The table row that starts with a label, as text."""
    found = re.search(rf'<tr[^>]*><th scope="row">{label}.*?</tr>', html, re.DOTALL)
    assert found, f"no row {label!r}"
    return Page(found[0]).text


def test_a_finished_run_is_told_whole(run: Path) -> None:
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path.read_text())
    sections = ["results", "curves", "cost", "continuations", "preparation", "reproduce"]
    assert [value for value in page.ids if value in sections] == sections
    assert page.text.count("Cross-entropy (nats per target)") == 1
    for words in ("max_length: 256", "2.13.0+cpu", "def _check_arg_types", "−20 exact duplicate"):
        assert words in page.text
    assert row(path.read_text(), "Perplexity") == (
        "Perplexity ↓ 75.61 1,834 105.9 87.90 86.0% 59.4%"
    )
    assert list(run.glob(".*")) == [], "no unfinished file stays"


def test_it_fetches_nothing_and_runs_nothing(run: Path) -> None:
    html = write_report(run).read_text()
    fetching = {"script", "link", "img", "iframe", "object", "embed", "base", "form", "image"}
    page = Page(html)
    assert not fetching & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not {"src", "srcset", "action"} & attributes.keys()
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\"'\s<>)]+", html)) <= namespaces
    assert "@import" not in html
    assert "default-src 'none'" in html


def test_ids_are_unique_and_references_lead_somewhere(run: Path) -> None:
    html = write_report(run).read_text()
    ids = Page(html).ids
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', html)) <= set(ids)


def test_hostile_text_stays_text(run: Path) -> None:
    def poison(metrics: dict[str, Any]) -> None:
        metrics["continuations"] = [{"prompt": HOSTILE, "teacher": HOSTILE, "student": HOSTILE}]
        metrics["versions"] = {HOSTILE: HOSTILE}
        metrics["machine"] = {HOSTILE: [HOSTILE]}
        metrics["student"][HOSTILE] = 1.0

    steps = {"steps": [{"name": HOSTILE, "split": HOSTILE, "rows": 1, "removed": {HOSTILE: 2}}]}
    (run / "data" / "preparation.json").write_text(json.dumps(steps))
    recipe = {"name": HOSTILE, "teacher": {"model": HOSTILE}, "student": {"layers": HOSTILE}}
    (run / "recipe.yaml").write_text(json.dumps(recipe))
    entry = {"step": 1, HOSTILE: 1.0, f"eval_{HOSTILE}": 1.0}
    (run / "student" / "log_history.json").write_text(json.dumps([entry]))
    html = with_metrics(run, poison)
    assert "<script" not in html.lower()
    assert Page(html).text.count("alert(") >= 10, "shown as what it is"


def test_the_page_keeps_line_breaks_of_a_continuation(run: Path) -> None:
    def edit(metrics: dict[str, Any]) -> None:
        metrics["continuations"] = [{"prompt": "a", "student": "\n\n  b"}]

    # HTML drops one newline right after <pre>, so a third one must stand there.
    assert "<pre>\n\n\n  b</pre>" in with_metrics(run, edit)


@pytest.mark.parametrize(
    ("absent", "section"),
    [
        ("data/preparation.json", "preparation"),
        ("*/log_history.json", "curves"),
    ],
)
def test_a_missing_file_leaves_out_its_section(run: Path, absent: str, section: str) -> None:
    for path in run.glob(absent):
        path.unlink()
    assert section not in Page(write_report(run).read_text()).ids


def test_metrics_alone_are_enough(run: Path) -> None:
    for path in [path for path in run.rglob("*") if path.is_file() and path.name != "metrics.json"]:
        path.unlink()

    def reduce(metrics: dict[str, Any]) -> None:
        metrics.clear()
        metrics["student"] = {"perplexity": 12.5}

    page = Page(with_metrics(run, reduce))
    assert [value for value in page.ids if value] == ["results"]
    assert "12.50" in page.text


def test_without_a_baseline_nothing_is_claimed(run: Path) -> None:
    def drop(metrics: dict[str, Any]) -> None:
        del metrics["baseline"], metrics["comparison"]
        for sample in metrics["continuations"]:
            del sample["baseline"]

    page = Page(with_metrics(run, drop))
    assert "there is no baseline to compare with" in page.text
    assert "No baseline was trained." in page.text
    assert "best" not in [attributes.get("class") for _, attributes in page.tags]


def test_what_was_not_measured_is_a_dash(run: Path) -> None:
    def drop(metrics: dict[str, Any]) -> None:
        metrics["baseline"]["decode_tokens_per_s"] = None
        metrics["student"]["decode_tokens_per_s"] = float("nan")

    html = with_metrics(run, drop)
    assert row(html, "Decode speed") == "Decode speed tokens/s ↑ 251.3 455.8 – – – –"
    assert "nan" not in Page(html).text.lower().split()


@pytest.mark.parametrize(
    ("student", "baseline", "best"),
    [(80.0, 90.0, "student"), (90.0, 80.0, "baseline"), (80.0, 80.0, None)],
)
def test_the_better_one_is_marked(
    run: Path, student: float, baseline: float, best: str | None
) -> None:
    def edit(metrics: dict[str, Any]) -> None:
        metrics["student"], metrics["baseline"] = {"perplexity": student}, {"perplexity": baseline}

    html = with_metrics(run, edit)
    marked = re.findall(r'<td class="best">([^<]+)</td>', html)
    assert marked == ([] if best is None else ["80.00"])
    cells = re.findall(r'<td class="(\w*)">', html)[:4]  # teacher, initial, baseline, student
    assert [
        role for role, cell in zip(("baseline", "student"), cells[2:], strict=True) if cell
    ] == ([best] if best else [])


def test_more_agreement_is_better_not_worse(run: Path) -> None:
    html = write_report(run).read_text()
    assert re.search(r'<td class="best">73\.4%</td>', html)
    assert not re.search(r'<td class="best">62\.1%</td>', html)


def compared(**figures: tuple[float, float]) -> dict[str, dict[str, float]]:
    """Models with the given (student, baseline) figures."""
    return {
        "student": {key: pair[0] for key, pair in figures.items()},
        "baseline": {key: pair[1] for key, pair in figures.items()},
    }


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("f1", "brought F1 of the answers to"),
        ("bleu", "brought BLEU to"),
        ("accuracy", "brought accuracy to"),
        ("pearson", "brought Pearson correlation to"),
    ],
)
def test_abbreviations_keep_their_capitals(key: str, name: str) -> None:
    assert name in headline(compared(**{key: (0.9, 0.8)}), "T", "S")


def test_the_headline_is_honest_either_way() -> None:
    won = headline(compared(perplexity=(87.9, 105.9), kl_to_teacher=(0.2, 0.4)), "T", "S")
    assert won == (
        "Distilling T into S brought perplexity to 87.90, 17% lower than the baseline’s 105.9 "
        "and KL to the teacher to 0.2000, 50% lower than the baseline’s 0.4000."
    )
    lost = headline(compared(perplexity=(105.9, 87.9), kl_to_teacher=(0.4, 0.2)), "T", "S")
    assert "20% higher than the baseline’s 87.90" in lost
    assert lost.endswith("; distillation did not help here.")
    mixed = headline(compared(perplexity=(105.9, 87.9), kl_to_teacher=(0.2, 0.4)), "T", "S")
    assert " but KL to the teacher" in mixed
    assert "did not help" not in mixed
    same = headline(compared(perplexity=(87.9, 87.9)), "T", "S")
    assert "the same as the baseline’s 87.90; distillation did not help here" in same
    models = compared(perplexity=(87.9, 105.9))
    models["off_policy"] = models.pop("baseline")
    assert "17% lower than the off-policy student’s 105.9" in headline(models, "T", "S")


def test_a_student_without_a_baseline_but_two_trainings(run: Path) -> None:
    def edit(metrics: dict[str, Any]) -> None:
        metrics["off_policy"] = metrics.pop("baseline")

    html = with_metrics(run, edit)
    assert "<th>Off-policy</th>" in html
    assert "Gap closed" not in html
    assert "No baseline was trained." in html


def test_models_are_called_what_the_recipe_calls_them(run: Path) -> None:
    assert "a gpt2 teacher trained from scratch (2.62M parameters)" in write_report(run).read_text()
    recipe = "teacher: {model: openai-community/gpt2-large}\nstudent: {model: gpt2, lora: {r: 8}}\n"
    (run / "recipe.yaml").write_text(recipe)
    html = write_report(run).read_text()
    assert "Distilling gpt2-large (2.62M parameters) into gpt2 with LoRA adapters (1.73M" in html


@pytest.mark.parametrize(
    ("student", "name"),
    [
        ({"layers": "influence", "num_layers": 24}, "made of its 24 most influential layers"),
        ({"layers": "influence", "num_layers": 4, "ffn": 0.75},
         "made of its 4 most influential layers with 75% of the neurons in each layer"),
        ({"ffn": 1128, "heads": 6, "hidden": 0.5},
         "1,128 neurons in each layer, 6 attention heads and 50% of the hidden units"),
    ],
)  # fmt: skip
def test_students_are_called_by_what_is_kept(student: dict[str, Any], name: str) -> None:
    assert names({"teacher": {"model": "a/b"}, "student": student})[1].endswith(name)


@pytest.mark.parametrize("damaged", ["metrics.json", "data/preparation.json", "recipe.yaml"])
def test_a_damaged_file_is_named_in_one_line(run: Path, damaged: str) -> None:
    write_report(run)
    before = (run / "report.html").read_text()
    (run / damaged).write_text('{"steps": [')
    with pytest.raises(InputError, match=Path(damaged).name) as caught:
        write_report(run)
    assert "\n" not in str(caught.value)
    assert (run / "report.html").read_text() == before, "the last whole report stays"


@pytest.mark.parametrize("text", ["[]", "{}", '{"teacher": {"perplexity": 3.0}}'])
def test_metrics_without_a_student_are_refused(run: Path, text: str) -> None:
    (run / "metrics.json").write_text(text)
    with pytest.raises(InputError, match=r"metrics\.json"):
        write_report(run)


def test_a_run_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no metrics\.json.*finish its evaluation"):
        write_report(tmp_path)
    with pytest.raises(InputError, match=r"none' is not a folder: give the folder of a run"):
        write_report(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


# ---- Plots ----


def test_curves_take_any_divergence_by_its_name(run: Path) -> None:
    for role in ("baseline", "student"):
        path = run / role / "log_history.json"
        path.write_text(path.read_text().replace("forward_kl", "my_distance"))
    html = write_report(run).read_text()
    assert "My distance" in Page(html).text
    assert "Forward KL" not in html


def test_plots_hold_every_point_and_each_models_colour() -> None:
    history = [{"step": step, "eval_ce": 5.0 - step / 10} for step in (10, 20, 30)]
    svg = plots.curves({"baseline": history, "student": history[:2]}, "ce", "CE", teacher=1.5)
    assert svg is not None
    ElementTree.fromstring(svg)  # well-formed
    marks = re.findall(r'<use [^>]*style="[^"]*fill: var\(--(\w+)\)', svg)
    assert {role: marks.count(role) for role in ("baseline", "student")} == {
        "baseline": 3,
        "student": 2,
    }
    assert "stroke: var(--teacher)" in svg
    literal = set(re.findall(r"#[0-9a-f]{6}", svg)) - {"#000000"}
    assert not literal, "every colour is the page's"


def test_nothing_logged_is_no_plot() -> None:
    assert plots.curves({"student": log_history(distilled=True)}, "absent", "x") is None
    assert plots.curves({"student": [{"step": 1, "ce": float("nan")}]}, "ce", "x") is None
    assert plots.scatter({"student": METRICS["student"]}, "parameters", "perplexity") is None


def test_a_single_flat_point_is_drawn() -> None:
    svg = plots.curves({"student": [{"step": 1, "ce": 2.0}]}, "ce", "CE")
    assert svg is not None
    ElementTree.fromstring(svg)


def test_models_that_differ_by_much_are_drawn_on_a_logarithmic_axis() -> None:
    models = {"teacher": {"parameters": 7e9, "perplexity": 5.0}}
    models |= {"student": {"parameters": 1e8, "perplexity": 9.0}}
    svg = plots.scatter(models, "parameters", "perplexity")
    assert svg is not None
    words = "".join(ElementTree.fromstring(svg).itertext()).split()
    assert {"1B", "10B", "teacher", "student"} <= set(words)


def test_names_of_close_points_do_not_overlap() -> None:
    same = {"parameters": 100, "perplexity": 10.0}
    models = dict.fromkeys(("teacher", "baseline", "student"), same)
    svg = plots.scatter(models, "parameters", "perplexity")
    assert svg is not None
    heights = {
        element.text: float(element.attrib["y"])
        for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
        if element.text in models
    }
    ordered = sorted(heights.values())
    assert len(ordered) == 3
    assert min(b - a for a, b in pairwise(ordered)) > 12


def test_the_same_run_gives_the_same_bytes(run: Path) -> None:
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


# ---- Numbers ----


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0, "0"),
        (1234567, "1,234,567"),
        (21345.6, "21,346"),
        (999.96, "1,000"),
        (105.912, "105.9"),
        (9.99996, "10.00"),
        (0.48123, "0.4812"),
        (0.00012345, "0.0001234"),
        (1.5e-9, "1.5e-09"),
        (-3.14159, "-3.142"),
    ],
)
def test_numbers_have_four_significant_digits(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (950, "950"), (1729536, "1.73M"), (124439808, "124.4M"), (7e9, "7B")],
)
def test_counts_are_short(value: float, text: str) -> None:
    assert compact(value) == text


def test_a_change_is_told_in_words() -> None:
    assert change_in_words(90, 100) == "10% lower"
    assert change_in_words(1.02, 1) == "2.0% higher"
    assert change_in_words(1.0001, 1) == ""
    assert change_in_words(1, 0) == ""


def test_several_sets_have_their_tables_curves_and_verdict(run: Path) -> None:
    def edit(metrics: dict[str, Any]) -> None:
        worse = {**MODELS["student"], "kl_to_teacher": 0.9, "perplexity": 7654.0}
        roles = ("teacher", "initial", "baseline", "student")
        metrics["sets"] = {
            "novels": {role: metrics[role] for role in roles},
            "news": {**{role: metrics[role] for role in roles}, "student": worse},
        }

    for role in ("baseline", "student"):
        path = run / role / "log_history.json"
        entries = [
            {key.replace("eval_", "eval_news_"): value for key, value in entry.items()}
            for entry in json.loads(path.read_text())
        ]
        path.write_text(json.dumps(entries))
    html = with_metrics(run, edit)
    assert "nearer to its teacher than the baseline on novels (KL 0.2187, baseline 0.4812)" in html
    assert "it is not on news (KL 0.9000, baseline 0.4812)" in html
    assert html.index("<h3>novels</h3>") < html.index("<h3>news</h3>") < html.index("7,654")
    assert "Cross-entropy (nats per target), news" in html
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))


def test_trainings_without_evaluation_are_drawn_once(run: Path) -> None:
    def edit(metrics: dict[str, Any]) -> None:
        metrics["sets"] = {name: dict(MODELS) for name in ("novels", "news")}

    for role in ("baseline", "student"):
        path = run / role / "log_history.json"
        entries = [e for e in json.loads(path.read_text()) if "loss" in e]
        path.write_text(json.dumps(entries))
    html = with_metrics(run, edit)
    assert html.count(">Loss, each model's own objective") == 1
    assert "own objective, n" not in html


def test_the_log_of_one_of_several_sets() -> None:
    entry = {"step": 5, "eval_a_ce": 1.0, "eval_a_b_ce": 2.0, "loss": 3.0}
    names = ["a", "a_b"]
    assert history_of_set([entry], "a", names) == [{"step": 5, "eval_ce": 1.0, "loss": 3.0}]
    assert history_of_set([entry], "a_b", names) == [{"step": 5, "eval_ce": 2.0, "loss": 3.0}]


def test_a_speed_whose_rounds_differ_is_marked(run: Path) -> None:
    def edit(metrics: dict[str, Any]) -> None:
        metrics["student"]["decode_tokens_per_s_spread"] = 0.43
        metrics["baseline"]["decode_tokens_per_s_spread"] = 0.19

    html = with_metrics(run, edit)
    assert "~455.8" in html
    assert html.count("~455.8") == 1
    assert "differ by up to 43% of their median" in html
    assert "_spread" not in html


def test_benchmarks_with_standard_errors(run: Path) -> None:
    def edit(metrics: dict[str, Any]) -> None:
        scores = {"teacher": {"value": 0.5, "stderr": 0.021}, "student": {"value": 0.25}}
        metrics["harness"] = {"version": "1", "tasks": {HOSTILE: {"acc": scores}}}

    html = with_metrics(run, edit)
    assert "<td>0.500 ± 0.021</td><td>0.250</td>" in html
    assert HOSTILE not in html
