"""The model card of a student: origin, training, and measured results."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from hf_distill.models.heads import HEADS
from hf_distill.reporting.comparison import benchmark_rows, nearer_sentence
from hf_distill.reporting.formatting import BY_KEY, ROLES, figures_of, measured, unsteady_note

TAGS = ("distillation", "hf-distill")
DATA_SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".parquet", ".arrow", ".gz", ".xz", ".zst")
PUBLISHED_RESULTS = (
    "accuracy",
    "macro_f1",
    "entity_f1",
    "exact_match",
    "f1",
    "rouge1",
    "rouge2",
    "rougeL",
    "bleu",
    "chrf",
    "pearson",
    "perplexity",
    "bits_per_byte",
    "kl_to_teacher",
    "top1_agreement",
)
# By the key of a task: its name on the Hub, and peft's class for adapters (None: the model's own).
ON_THE_HUB: dict[str, tuple[str, str | None]] = {
    "causal-lm": ("text-generation", "AutoPeftModelForCausalLM"),
    "seq2seq-lm": ("text2text-generation", "AutoPeftModelForSeq2SeqLM"),
    "masked-lm": ("fill-mask", None),
    "sequence-classification": (
        "text-classification",
        "AutoPeftModelForSequenceClassification",
    ),
    "token-classification": ("token-classification", "AutoPeftModelForTokenClassification"),
    "question-answering": ("question-answering", "AutoPeftModelForQuestionAnswering"),
}
LONGEST_EXAMPLE = 200  # characters
# What a student without a repository is loaded from; its own path would disclose folders.
HERE = "."
HERE_NOTE = "# The folder of this file: run this there, or give its path."

Metrics = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class CardFacts:
    """The facts of a card. What is None or empty does not appear in it.

    model_name: the title; teacher, initial_from: Hub ids, local paths or a few words
    dataset: one or several Hub ids or local paths
    evaluated_on: the same for each set of held-out rows by name, "" where there is one; {} where
        they were held out from `dataset`
    objective: alpha, temperature, divergence and its parameters, by name
    metrics: {"student": {"perplexity": ...}, "teacher": {...}, ...} as in ``metrics.json``, and
        where there are several sets of held-out rows, the same under `sets` by name
    training: steps, learning rate, seed and the like, by name
    repo_id: where it will be published, for the snippet that loads it; without one it loads from
        the folder of the card
    adapter: True where only a PEFT adapter is saved
    task: its key
    examples: held-out rows with `prompt`, `reference` and the prediction of each model
    unequal: sentences on what student and baseline did not learn alike, see `report.unequal`
    Of a local path only the last name is written.
    """

    model_name: str
    teacher: str | None = None
    initial_from: str | None = None
    dataset: str | Sequence[str] | None = None
    evaluated_on: Mapping[str, Sequence[str]] = field(default_factory=dict)
    objective: Mapping[str, Any] = field(default_factory=dict)
    metrics: Metrics | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    tags: Sequence[str] = ()
    language: str | Sequence[str] | None = None
    license: str | None = None
    repo_id: str | None = None
    adapter: bool = False
    task: str = "causal-lm"
    examples: Sequence[Mapping[str, str]] = ()
    unequal: Sequence[str] = ()


def write_card(folder: str | Path, facts: CardFacts) -> Path:
    """``README.md`` in the student's folder; it appears under that name only when it is whole."""
    path = Path(folder) / "README.md"
    unfinished = path.with_name(".README.md.unfinished")
    unfinished.write_text(render_card(facts), encoding="utf-8")
    os.replace(unfinished, path)
    return path


def render_card(facts: CardFacts) -> str:
    """The card as Markdown with its YAML metadata."""
    name = _one_line(public_name(facts.model_name))
    datasets = _as_list(facts.dataset)
    metrics = facts.metrics or {}
    models = models_of(metrics)
    sets = metrics.get("sets") or {}
    # The figures of the first set are the main ones, and stand beside the costs.
    tables = {next(iter(sets), ""): models}
    tables |= {name: models_of(sets[name]) for name in list(sets)[1:]}
    text = _TEMPLATES.get_template("card.md.jinja").render(
        metadata=_metadata(facts, name, models).to_yaml().strip(),
        name=name,
        model_id=facts.repo_id or HERE,
        here=HERE,
        here_note=HERE_NOTE,
        task=facts.task,
        **_classes(facts),
        examples=[{key: _shortened(text) for key, text in row.items()} for row in facts.examples],
        teacher=_mention(facts.teacher),
        initial_from=_mention(facts.initial_from),
        datasets=_mentions(datasets),
        objective=_readable(facts.objective),
        training=_readable(facts.training),
        versions=_readable(facts.versions),
        models=models,
        unequal=facts.unequal,
        tables=[
            (name, table, figures_of(table), _mentions(facts.evaluated_on.get(name)))
            for name, table in tables.items()
            if table
        ],
        nearer=nearer_sentence(sets),
        benchmarks=[
            {**row, **{name: _one_line(row[name]) for name in ("task", "metric")}}
            for row in benchmark_rows(metrics)
        ],
        unsteady=unsteady_note(models),
        measured=measured,
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def models_of(metrics: Metrics) -> dict[str, Mapping[str, Any]]:
    """The models with at least one figure, in their order."""
    return {role: metrics[role] for role in ROLES if figures_of({role: metrics.get(role, {})})}


def _classes(facts: CardFacts) -> dict[str, str]:
    """The class that loads the model, and the package that has it."""
    of_peft = ON_THE_HUB[facts.task][1]
    if facts.adapter and of_peft is not None:
        return {"package": "peft", "loader": of_peft}
    return {"package": "transformers", "loader": HEADS[facts.task][0].__name__}


def _shortened(text: str) -> str:
    text = _one_line(text)
    return text if len(text) <= LONGEST_EXAMPLE else f"{text[: LONGEST_EXAMPLE - 1]}…"


def with_model_id(card: str, model_id: str) -> str:
    """The same card, its snippet loading the model from ``model_id``."""
    line = f"model_id = {quoted(model_id)}"
    old = rf'^({re.escape(HERE_NOTE)}\n)?model_id = ".*"$'
    return re.sub(old, lambda _: line, card, count=1, flags=re.MULTILINE)


def hub_id(name: str | None) -> str | None:
    """``name`` if it can only be an id on the Hub, None if it is a path or a few words."""
    if not name or name.endswith(DATA_SUFFIXES) or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def public_name(text: str) -> str:
    """``text`` with every local path in it cut to its last name, so that no folder is disclosed."""
    if hub_id(text):
        return text
    if Path(text).exists() or (re.search(r"[\\/]", text) and not re.search(r"\s", text)):
        return _last_name(text)
    return re.sub(r"(?<![\w.~])(?:~|\.{1,2}|[A-Za-z]:)?[\\/][^\s'\",;]+", _last_of_match, text)


def _last_of_match(match: re.Match[str]) -> str:
    return _last_name(match[0])


def _last_name(path: str) -> str:
    """The last part of a path that is not a wildcard."""
    parts = [part for part in re.split(r"[\\/]+", path) if part not in ("", ".", "..", "~")]
    named = [part for part in parts if not re.search(r"[*?\[\]{}]", part)]
    return (named or parts or ["local files"])[-1]


def _mention(text: str | None) -> str | None:
    """In prose: a name as code, a few words as they are."""
    if not text:
        return None
    name = _one_line(public_name(text))
    return name if " " in name else f"`{name}`"


def _mentions(places: Iterable[str] | None) -> list[str | None]:
    return [_mention(place) for place in places or ()]


def _readable(values: Mapping[str, Any]) -> dict[str, str]:
    """Names and values as text for a list; absent ones left out, paths cut, lines joined."""
    shown = {key: value for key, value in values.items() if value not in (None, "", [], {})}
    return {
        _one_line(str(key).replace("_", " ")): _one_line(public_name(str(value)))
        for key, value in shown.items()
    }


def _one_line(text: str) -> str:
    return " ".join(text.replace("`", "'").replace("|", "/").split())


def quoted(text: str) -> str:
    """A Python string literal in double quotes."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def metrics_of_evaluation(logged: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """What ``Trainer.evaluate()`` returned, as the ``metrics`` of ``CardFacts``.

    logged: ``eval_loss``, ``eval_ce``, ``eval_<divergence>``, ``eval_teacher_ce``, ...; the
        evaluation's own running time and the epoch are left out
    """
    prefix = "eval_"
    values = {k.removeprefix(prefix): v for k, v in logged.items() if k.startswith(prefix)}
    teacher = {"ce": values.pop("teacher_ce")} if "teacher_ce" in values else {}
    student = {k: v for k, v in values.items() if not re.search(r"_time$|runtime$|_per_second$", k)}
    return {"teacher": teacher, "student": student}


def _as_list(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _metadata(facts: CardFacts, name: str, models: Metrics) -> ModelCardData:
    bases = [base for base in (hub_id(facts.initial_from), hub_id(facts.teacher)) if base]
    datasets = [dataset for dataset in map(hub_id, _as_list(facts.dataset)) if dataset]
    results = _eval_results(facts, models)
    return ModelCardData(
        base_model=list(dict.fromkeys(bases)) or None,
        datasets=datasets or None,
        eval_results=results or None,
        model_name=name if results else None,
        language=_as_list(facts.language) or None,
        library_name="peft" if facts.adapter else "transformers",
        license=facts.license,
        pipeline_tag=ON_THE_HUB[facts.task][0],
        tags=[*TAGS, *facts.tags],
    )


def _eval_results(facts: CardFacts, models: Metrics) -> list[EvalResult]:
    """The student's own measured figures, in the form that the Hub shows beside the card."""
    # The main figures are those of the first set.
    set_name, places = next(iter(facts.evaluated_on.items()), ("", _as_list(facts.dataset)))
    if not places or "student" not in models:
        return []
    names = [_one_line(public_name(place)) for place in places]
    said = ", ".join(names) if facts.evaluated_on else f"held-out rows of {', '.join(names)}"
    return [
        EvalResult(
            task_type=ON_THE_HUB[facts.task][0],
            dataset_type=names[0],
            dataset_name=f"{_one_line(set_name)} ({said})" if set_name else said,
            metric_type=key,
            metric_name=BY_KEY[key].label,
            metric_value=value,
        )
        for key in PUBLISHED_RESULTS
        if (value := measured(models["student"], key)) is not None
    ]


_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("hf_distill.reporting"),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
    autoescape=False,  # Markdown, not HTML: what comes from outside goes through `_one_line`
)
_TEMPLATES.filters["quoted"] = quoted
