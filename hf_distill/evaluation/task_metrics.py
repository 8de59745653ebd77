"""`evaluate` metrics of classification, regression and extractive question answering."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from datasets import List, Value

from hf_distill.errors import InputError
from hf_distill.evaluation.pairs import PairMetric
from hf_distill.losses.targets import IGNORE

_CLASS, _NUMBER, _TEXT = Value("int64"), Value("float64"), Value("string")


class Classification(PairMetric):
    """`accuracy`, and `macro_f1`, the mean F1 of the classes, both 0 to 1.

    predictions, references: the index of a class. Rows with the reference -100 are left out.
    Classes that occur in neither are left out of the mean.
    """

    columns: ClassVar = {"predictions": _CLASS, "references": _CLASS}

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        said, true = np.asarray(predictions), np.asarray(references)
        said, true = said[true != IGNORE], true[true != IGNORE]
        if not len(true):
            raise InputError(
                "every reference is -100, so there is nothing to measure: give labelled rows"
            )
        return {"accuracy": float((said == true).mean()), "macro_f1": _macro_f1(said, true)}


class TokenClassification(PairMetric):
    """`accuracy` and `macro_f1` of all labelled tokens of all rows, both 0 to 1.

    predictions, references: a list of class indices a row. Tokens with the reference -100 are left
    out; see `Classification`.
    """

    columns: ClassVar = {"predictions": List(_CLASS), "references": List(_CLASS)}

    def _compute(
        self, predictions: Sequence[Sequence[int]], references: Sequence[Sequence[int]]
    ) -> dict[str, float]:
        for row, (said, true) in enumerate(zip(predictions, references, strict=True)):
            _check_tags(row, said, true)
        flat = [
            np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
            for rows in (predictions, references)
        ]
        return Classification().compute(predictions=flat[0], references=flat[1])


class Entities(PairMetric):
    """`entity_precision`, `entity_recall` and `entity_f1` over the entities of all rows, 0 to 1.

    predictions, references: a list of tags a row, "O", "B-PER", "I-PER", ... An entity is right
    if its kind, its first and its last token are right. An I without an entity of its kind before
    it begins one, as in CoNLL's evaluation script. All three are 0 if no entity is right.
    Source: Tjong Kim Sang and De Meulder, CoNLL-2003.
    """

    columns: ClassVar = {"predictions": List(_TEXT), "references": List(_TEXT)}

    def _compute(
        self, predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
    ) -> dict[str, float]:
        right = said = true = 0
        for row, (tags, wanted) in enumerate(zip(predictions, references, strict=True)):
            _check_tags(row, tags, wanted)
            ours, theirs = entities(tags), entities(wanted)
            right, said, true = right + len(ours & theirs), said + len(ours), true + len(theirs)
        return {
            "entity_precision": right / max(said, 1),
            "entity_recall": right / max(true, 1),
            "entity_f1": 2 * right / max(said + true, 1),
        }


def names_entities(tags: Sequence[str]) -> bool:
    """Whether tags mark the beginnings (B-) and insides (I-) of entities, and nothing else."""
    marks = {tag[:2] for tag in tags}
    return marks <= {"B-", "I-", "O"} and bool(marks - {"O"})


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The entities of a row: kind, first token, last token + 1."""
    found = set()
    kind, start = None, 0
    for place, tag in enumerate([*tags, "O"]):
        if kind is not None and tag == f"I-{kind}":
            continue
        if kind is not None:
            found.add((kind, start, place))
        kind, start = None if tag == "O" else tag[2:], place
    return found


def _check_tags(row: int, said: Sequence[Any], true: Sequence[Any]) -> None:
    if len(said) != len(true):
        raise InputError(
            f"row {row} has {len(said)} predicted tags and {len(true)} true ones: "
            "give one of both for each token"
        )


class MultiLabelClassification(PairMetric):
    """`accuracy`, `macro_f1` and `micro_f1` where a row has any number of labels; 0 to 1 each.

    predictions, references: a list of 0 or 1 for each label, a row. accuracy: the share of rows
    in which every label is right. A label that occurs in neither has an F1 of 0.
    """

    columns: ClassVar = {"predictions": List(_CLASS), "references": List(_CLASS)}

    def _compute(
        self, predictions: Sequence[Sequence[int]], references: Sequence[Sequence[int]]
    ) -> dict[str, float]:
        widths = {len(row) for row in (*predictions, *references)}
        if len(widths) != 1:
            raise InputError(f"rows have {sorted(widths)} labels, but all must have the same")
        said, true = np.asarray(predictions), np.asarray(references)
        if not np.isin((said, true), (0, 1)).all():
            raise InputError("a row with several labels must hold 0 or 1 for each label")
        both, either = (said & true).sum(0), said.sum(0) + true.sum(0)
        return {
            "accuracy": float((said == true).all(1).mean()),
            "macro_f1": float(np.mean(2 * both / np.maximum(either, 1))),
            "micro_f1": float(2 * both.sum() / max(either.sum(), 1)),
        }


def _macro_f1(said: Any, true: Any) -> float:
    scores = []
    for index in np.union1d(said, true):
        both = ((said == index) & (true == index)).sum()
        scores.append(2 * both / ((said == index).sum() + (true == index).sum()))
    return float(np.mean(scores))


class Regression(PairMetric):
    """`mse`, the mean squared error, and the correlations `pearson` and `spearman`, -1 to 1.

    The correlations are absent where predictions or references are all equal, since they are
    undefined there.
    """

    columns: ClassVar = {"predictions": _NUMBER, "references": _NUMBER}

    def _compute(
        self, predictions: Sequence[float], references: Sequence[float]
    ) -> dict[str, float]:
        from scipy import stats  # half a second

        said, true = np.asarray(predictions), np.asarray(references)
        for name, values in (("prediction", said), ("reference", true)):
            if not np.isfinite(values).all():
                row = int(np.flatnonzero(~np.isfinite(values))[0])
                raise InputError(f"the {name} of row {row} is {values[row]}, which is no number")
        figures = {"mse": float(np.mean((said - true) ** 2))}
        if np.ptp(said) > 0 and np.ptp(true) > 0:
            figures["pearson"] = float(stats.pearsonr(said, true).statistic)
            figures["spearman"] = float(stats.spearmanr(said, true).statistic)
        return figures


class QuestionAnswering(PairMetric):
    """`exact_match` and `f1` of answers, mean of the rows, 0 to 100, as in SQuAD 1.1 and 2.0.

    predictions: the answer; "" where there is none
    references: the list of accepted answers, of which the best counts; [] where there is none
    Answers are compared in lower case without punctuation, articles and repeated white space. F1 is
    that of their words. With unanswerable rows there are also `has_answer_exact_match`,
    `has_answer_f1` (absent if all are unanswerable) and `no_answer_accuracy`.
    Source: Rajpurkar et al., arXiv:1606.05250 and arXiv:1806.03822.
    """

    columns: ClassVar = {"predictions": _TEXT, "references": List(_TEXT)}

    def _compute(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, float]:
        answered: list[tuple[float, float]] = []
        unanswerable: list[tuple[float, float]] = []
        for said, accepted in zip(predictions, references, strict=True):
            (answered if len(accepted) else unanswerable).append(answer_scores(said, accepted))
        figures = _percent(answered + unanswerable)
        if unanswerable:
            if answered:
                split = _percent(answered)
                figures |= {f"has_answer_{name}": value for name, value in split.items()}
            figures["no_answer_accuracy"] = _percent(unanswerable)["exact_match"]
        return figures


def normalized_answer(text: str) -> str:
    """An answer in lower case, without punctuation, articles and repeated white space."""
    kept = "".join(mark for mark in text.lower() if mark not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def answer_scores(said: str, accepted: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 of an answer, 0 to 1, of the accepted answer that gives the best of each.

    said, accepted: see `QuestionAnswering`
    """
    # An answer of articles and punctuation alone cannot be matched, as in SQuAD 2.0.
    words = [text for text in map(normalized_answer, accepted) if text]
    scores = [_answer_scores(normalized_answer(said), text) for text in words or [""]]
    exact, f1 = zip(*scores, strict=True)
    return max(exact), max(f1)


def _answer_scores(said: str, true: str) -> tuple[float, float]:
    """Exact match and F1 of normalised answers, 0 or 1 and 0 to 1."""
    exact = float(said == true)
    if not said or not true:
        return exact, exact
    ours, theirs = said.split(), true.split()
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return exact, 2 * shared / (len(ours) + len(theirs))


def _percent(scores: list[tuple[float, float]]) -> dict[str, float]:
    exact, f1 = (100 * float(np.mean(column)) for column in zip(*scores, strict=True))
    return {"exact_match": exact, "f1": f1}
