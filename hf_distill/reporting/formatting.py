"""Names, units, directions and formats of all figures in reports, comparisons and model cards."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Better = Literal["lower", "higher"] | None

ROLES = ("unadapted", "teacher", "initial", "baseline", "off_policy", "student")
"""The models of a run, in the order in which they are shown. Unadapted is the teacher as it was
given, where the run adapts it to its rows."""


@dataclass(frozen=True)
class Figure:
    """One figure of a model.

    better: which direction is an improvement, None where neither is
    judged: whether to mark the better of baseline and student; not for costs such as the size,
        which are equal by construction
    """

    key: str
    label: str
    unit: str = ""
    better: Better = None
    judged: bool = False
    percent: bool = False

    def text(self, value: float | None) -> str:
        """The number with its thousands separated and at most four significant digits."""
        if value is None:
            return "–"
        if self.percent:
            return f"{100 * value:.1f}%"
        return compact(value) if self.key == "parameters" else number(value)

    def cell(self, model: Mapping[str, Any] | None) -> str:
        """The model's number, with "~" before a speed whose rounds differ by too much."""
        text = self.text(measured(model, self.key))
        return f"~{text}" if _is_unsteady(model, self.key) else text

    def mean_text(self, values: Sequence[float]) -> str:
        """The mean of several runs ± their standard deviation; a single value as it is.

        The deviation has two significant digits, the mean as many decimals as the deviation.
        """
        if len(set(values)) < 2:
            return self.text(values[0] if values else None)
        scale = 100.0 if self.percent else 1.0
        mean, spread = scale * statistics.fmean(values), scale * statistics.stdev(values)
        # Five significant digits of the mean are enough, however small the deviation is.
        most = 2 if self.percent else 4 - _magnitude(mean)
        decimals = max(0, min(1 - _magnitude(spread), most))
        return f"{mean:,.{decimals}f} ± {spread:,.{decimals}f}{'%' if self.percent else ''}"

    def prefers(self, first: float, second: float) -> bool:
        """Whether the first is strictly better than the second."""
        return first < second if self.better == "lower" else first > second


FIGURES = (
    Figure("entity_f1", "F1 of the entities", "", "higher", True, percent=True),
    Figure("entity_precision", "Precision of the entities", "", "higher", True, percent=True),
    Figure("entity_recall", "Recall of the entities", "", "higher", True, percent=True),
    Figure("accuracy", "Accuracy", "", "higher", True, percent=True),
    Figure("macro_f1", "Mean F1 of the classes", "", "higher", True, percent=True),
    Figure("micro_f1", "F1 over all labels", "", "higher", True, percent=True),
    Figure("exact_match", "Exact match", "of 100", "higher", True),
    Figure("f1", "F1 of the answers", "of 100", "higher", True),
    Figure("has_answer_exact_match", "Exact match, answerable", "of 100", "higher", True),
    Figure("has_answer_f1", "F1, answerable", "of 100", "higher", True),
    Figure("no_answer_accuracy", "Accuracy, unanswerable", "of 100", "higher", True),
    Figure("rouge1", "ROUGE-1", "", "higher", True),
    Figure("rouge2", "ROUGE-2", "", "higher", True),
    Figure("rougeL", "ROUGE-L", "", "higher", True),
    Figure("rougeLsum", "ROUGE-Lsum", "", "higher", True),
    Figure("bleu", "BLEU", "of 100", "higher", True),
    Figure("brevity_penalty", "BLEU's brevity penalty"),
    Figure("chrf", "chrF", "of 100", "higher", True),
    Figure("pearson", "Pearson correlation", "", "higher", True),
    Figure("spearman", "Spearman correlation", "", "higher", True),
    Figure("mse", "Mean squared error", "", "lower", True),
    Figure("perplexity", "Perplexity", better="lower", judged=True),
    Figure("bits_per_byte", "Bits per byte", better="lower", judged=True),
    Figure("ce", "Cross-entropy", "nats per target", better="lower", judged=True),
    Figure("kl_to_teacher", "KL to the teacher", "nats per target", better="lower", judged=True),
    Figure("mse_to_teacher", "Squared difference to the teacher", "", "lower", True),
    Figure("top1_agreement", "Top-1 agreement with the teacher", "", "higher", True, percent=True),
    Figure("calibration_error", "Expected calibration error", "", "lower", True, percent=True),
    Figure("written_rougeL", "ROUGE-L of drawn text", "", "higher", True),
    Figure("written_reverse_kl", "KL to the teacher, drawn text", "nats per token", "lower", True),
    Figure("written_agreement", "Top-1 agreement, drawn text", "", "higher", True, percent=True),
    Figure("written_teacher_log_prob", "Teacher log-prob of drawn text", "nats per token"),
    Figure("written_log_prob", "Own log-prob of drawn text", "nats per token"),
    Figure("written_tokens", "Length of drawn text", "tokens"),
    Figure("written_cut", "Drawn texts without an end", percent=True),
    Figure("written_repetition", "Repeated pairs, drawn text", percent=True),
    Figure("written_distinct", "Different pairs, drawn text", percent=True),
    Figure("parameters", "Parameters", better="lower"),
    Figure("size_mb", "Size on disk", "MB", better="lower"),
    Figure("prefill_tokens_per_s", "Prefill speed", "tokens/s", better="higher"),
    Figure("decode_tokens_per_s", "Decode speed", "tokens/s", better="higher"),
    Figure("examples_per_s", "Prediction speed", "examples/s", better="higher"),
    Figure("peak_memory_mb", "Peak memory", "MB", better="lower"),
    Figure("train_seconds", "Training time", "s", better="lower"),
    Figure("targets", "Targets evaluated"),
)
DIVERGENCE_NAMES = {
    "forward_kl": "Forward KL (nats per target)",
    "reverse_kl": "Reverse KL (nats per target)",
    "jsd": "Jensen-Shannon divergence (nats per target)",
    "skew_forward_kl": "Skewed forward KL (nats per target)",
    "skew_reverse_kl": "Skewed reverse KL (nats per target)",
    "tvd": "Total variation distance per target",
}
# Beside a speed stands the spread of its rounds, (largest - smallest) / median, under its key with
# this ending.
SPREAD = "_spread"
LARGEST_SPREAD = 0.2
BY_KEY = {figure.key: figure for figure in FIGURES}
# The most important figures of a model, the most important first.
MAIN = (
    "entity_f1",
    "f1",
    "exact_match",
    "rougeL",
    "bleu",
    "accuracy",
    "pearson",
    "perplexity",
    "kl_to_teacher",
)


def main_figures(model: Mapping[str, Any], most: int = 2) -> list[Figure]:
    """The figures to show first of a model: those of its task that were measured."""
    return [BY_KEY[key] for key in MAIN if measured(model, key) is not None][:most]


def figures_of(models: Mapping[str, Mapping[str, Any]]) -> list[Figure]:
    """The figures that were measured of at least one of these models, known ones first."""
    known = [f for f in FIGURES if any(measured(m, f.key) is not None for m in models.values())]
    keys = dict.fromkeys(
        key
        for model in models.values()
        for key in model
        if key not in BY_KEY and not key.endswith(SPREAD)
    )
    others = [
        Figure(key, key.replace("_", " ").capitalize())
        for key in keys
        if any(measured(model, key) is not None for model in models.values())
    ]
    return known + others


def divergence_label(name: str) -> str:
    """The title of a divergence's plot."""
    return DIVERGENCE_NAMES.get(name, name.replace("_", " ").capitalize())


def unsteady_note(models: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What "~" means, and how large the largest spread is; None where no speed has the mark."""
    keys = {key.removesuffix(SPREAD) for model in models.values() for key in model}
    spreads = [
        model[key + SPREAD] for model in models.values() for key in keys if _is_unsteady(model, key)
    ]
    if not spreads:
        return None
    return (
        f"~: the rounds in which this speed was measured differ by up to {max(spreads):.0%} of "
        "their median. Probably something else was running; `hf-distill evaluate` measures again."
    )


def _is_unsteady(model: Mapping[str, Any] | None, key: str) -> bool:
    spread = measured(model, key + SPREAD)
    return spread is not None and spread > LARGEST_SPREAD


def measured(model: Mapping[str, Any] | None, key: str) -> float | None:
    """The finite number under that key, or None: what was not measured is never shown."""
    value = (model or {}).get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def _magnitude(value: float) -> int:
    """The power of ten of the first digit: 2 for 123.4, -2 for 0.0123."""
    return math.floor(math.log10(abs(value))) if value else 0


def number(value: float) -> str:
    """1234567 -> 1,234,567; 123.456 -> 123.5; 0.012345 -> 0.01234: four significant digits."""
    rounded = abs(float(f"{value:.3e}"))  # 9.9999 has as many digits as 10
    if isinstance(value, int) or value == 0 or rounded >= 1000:
        return f"{value:,.0f}"
    digits = 3 - math.floor(math.log10(rounded))
    return f"{value:.{digits}f}" if digits <= 7 else f"{value:.3g}"


def compact(value: float, like: float | None = None) -> str:
    """124439808 -> 124.4M, 2619264 -> 2.62M. like: the number whose suffix is taken instead."""
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value if like is None else like) >= limit:
            value /= limit
            digits = f"{value:,.{2 if abs(value) < 10 else 1}f}"
            return digits.rstrip("0").rstrip(".") + suffix if value else "0"
    return f"{value:.4g}"
