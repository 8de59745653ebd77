"""The measures of each task: columns by row from the outputs, then figures from all rows.

Rows are gathered over processes before they are added, so no figure depends on the batch size or
the number of processes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from hf_distill.data.task_forms import model_labels
from hf_distill.data.task_rows import read_questions
from hf_distill.errors import InputError
from hf_distill.evaluation import task_metrics
from hf_distill.evaluation.metrics import (
    BitsPerByte,
    CalibrationError,
    CrossEntropy,
    Perplexity,
    RowMetric,
    TeacherAgreement,
)
from hf_distill.evaluation.pair import Outputs, Pair
from hf_distill.evaluation.predictions import Predictions
from hf_distill.evaluation.row_sums import row_sums, text_bytes
from hf_distill.evaluation.spans import answers, best_spans
from hf_distill.losses.targets import IGNORE
from hf_distill.models.base import base_model
from hf_distill.tasks import (
    CausalLM,
    MaskedLM,
    QuestionAnswering,
    Seq2SeqLM,
    SequenceClassification,
    Task,
    TokenClassification,
)
from hf_distill.tasks.classification import NUMBERS, ONE
from hf_distill.tasks.question_answering import ANSWER_MASK

NO_ANSWER = "(no answer)"


class Measure(ABC):
    """Collects columns by row, and makes figures of them.

    widths_differ: columns whose width is not the same in all batches; filled with `IGNORE`
    """

    widths_differ: ClassVar[frozenset[str]] = frozenset()

    def __init__(self) -> None:
        self.rows: dict[str, list[Any]] = {}

    @abstractmethod
    def columns(self, outputs: Outputs) -> dict[str, Tensor]:
        """The columns to keep of a batch, (rows, ...) each."""

    @abstractmethod
    def figures(self) -> dict[str, float]:
        """The figures over all rows that were added."""

    def predictions(self) -> Predictions | None:
        """What the model predicts for each row, of a measure that keeps it."""
        return None

    def add(self, columns: Mapping[str, Tensor]) -> None:
        """Add the columns of a batch, gathered over all processes."""
        for name, values in columns.items():
            self.rows.setdefault(name, []).extend(values.tolist())


class Distributions(Measure):
    """Cross-entropy, calibration, and divergence from the teacher, from sums by row."""

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, shared: int) -> None:
        super().__init__()
        self._tokenizer, self._shared = tokenizer, shared
        self._spell = isinstance(task, CausalLM | Seq2SeqLM)  # masked tokens spell no text
        self._causal = isinstance(task, CausalLM)
        self._metrics: list[RowMetric] = [Perplexity() if task.fused else CrossEntropy()]
        self._metrics += [BitsPerByte()] if self._spell else []
        self._metrics += [CalibrationError()]
        self._seen = self._targets = 0

    def columns(self, outputs: Outputs) -> dict[str, Tensor]:
        """See `Measure.columns`."""
        # The outcomes of a question are the positions of its batch.
        shared = min(self._shared, outputs.student.shape[-1])
        sums = row_sums(outputs.student, outputs.teacher, outputs.labels, shared, outputs.labelled)
        if self._spell:
            inputs = outputs.batch.get("input_ids") if self._causal else None
            sums["bytes"] = text_bytes(outputs.labels, self._tokenizer, inputs)
        return sums

    def add(self, columns: Mapping[str, Tensor]) -> None:
        """See `Measure.add`."""
        _refuse_non_finite(columns, self._seen)
        if "kl" in columns and not any(isinstance(m, TeacherAgreement) for m in self._metrics):
            self._metrics.append(TeacherAgreement())
        for metric in self._metrics:
            metric.add_batch(**{name: columns[name].numpy() for name in metric.columns})
        self._seen += len(columns["targets"])
        self._targets += int(columns["targets"].sum())

    def figures(self) -> dict[str, float]:
        """See `Measure.figures`."""
        found: dict[str, float] = {"targets": self._targets}
        for metric in self._metrics:
            found |= metric.compute()
        return found


class Classes(Measure):
    """The likeliest class of each row or token, or of each of several labels yes or no.

    names: of the classes, by index
    """

    widths_differ: ClassVar[frozenset[str]] = frozenset({"predictions", "references"})

    def __init__(self, task: Task, names: Sequence[str]) -> None:
        super().__init__()
        self._names = names
        one = isinstance(task, SequenceClassification) and task.problem == ONE
        self._single, self._tags = one, isinstance(task, TokenClassification)

    def columns(self, outputs: Outputs) -> dict[str, Tensor]:
        """See `Measure.columns`: (rows, positions), `IGNORE` where there is no target."""
        true = outputs.labels.clone()
        target = true != IGNORE
        said = true.masked_scatter(target, outputs.student.argmax(-1))
        true[target] = outputs.labels[target].where(outputs.labelled, IGNORE)
        return {"predictions": said, "references": true}

    def figures(self) -> dict[str, float]:
        """See `Measure.figures`."""
        said, true = self.rows["predictions"], self.rows["references"]
        if self._single:
            flat = [[row[0] for row in rows] for rows in (said, true)]
            return task_metrics.Classification().compute(predictions=flat[0], references=flat[1])
        if self._tags:
            found = task_metrics.TokenClassification().compute(predictions=said, references=true)
            return found | self._of_entities(said, true)
        known = [row for row, labels in enumerate(true) if IGNORE not in labels]
        return task_metrics.MultiLabelClassification().compute(
            predictions=[said[row] for row in known], references=[true[row] for row in known]
        )

    def _of_entities(self, said: list[list[int]], true: list[list[int]]) -> dict[str, float]:
        """F1 of entities, where the classes are tags that mark them."""
        if not task_metrics.names_entities(self._names):
            return {}
        tags = {
            name: [
                [
                    self._names[one]
                    for one, label in zip(row, labels, strict=True)
                    if label != IGNORE
                ]
                for row, labels in zip(rows, true, strict=True)
            ]
            for name, rows in (("predictions", said), ("references", true))
        }
        return task_metrics.Entities().compute(**tags)

    def predictions(self) -> Predictions:
        """See `Measure.predictions`."""
        texts, references, scores = [], [], []
        for said, true in zip(self.rows["predictions"], self.rows["references"], strict=True):
            pairs = [pair for pair in zip(said, true, strict=True) if pair[1] != IGNORE]
            right = [one == label for one, label in pairs]
            score = float(np.mean(right)) if right else math.nan
            if not self._tags:  # a row has one label, or is right where all are
                score = math.nan if IGNORE in true else float(all(right))
            scores.append(score)
            texts.append(self._words([one for one, _ in pairs] if self._tags else said))
            references.append(self._words([label for _, label in pairs]))
        return Predictions(texts, references, scores)

    def _words(self, classes: Sequence[int]) -> str:
        if self._single or self._tags:
            return " ".join(self._names[one] for one in classes)
        given = (name for name, one in zip(self._names, classes, strict=False) if one == 1)
        return ", ".join(given) or "(none)"


class MaskedTokens(Measure):
    """The likeliest token at each masked place."""

    widths_differ: ClassVar[frozenset[str]] = frozenset({"predictions", "references"})

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def columns(self, outputs: Outputs) -> dict[str, Tensor]:
        """See `Measure.columns`: (rows, masked places), `IGNORE` after the last of a row."""
        target = outputs.labels != IGNORE
        values = {"predictions": outputs.student.argmax(-1), "references": outputs.labels[target]}
        counts = target.sum(1).tolist()
        return {
            name: pad_sequence(ids.split(counts), batch_first=True, padding_value=IGNORE)
            for name, ids in values.items()
        }

    def figures(self) -> dict[str, float]:
        """See `Measure.figures`: the share of masked places with the right token."""
        said, true = (np.concatenate(self._of(name)) for name in ("predictions", "references"))
        return {"accuracy": float((said == true).mean())}

    def predictions(self) -> Predictions:
        """See `Measure.predictions`."""
        said, true = self._of("predictions"), self._of("references")
        pairs = zip(said, true, strict=True)
        scores = [float((a == b).mean()) if len(b) else math.nan for a, b in pairs]
        return Predictions([*map(self._words, said)], [*map(self._words, true)], scores)

    def _of(self, name: str) -> list[Any]:
        """The ids of each row, without what fills it."""
        rows = (np.asarray(row, dtype=np.int64) for row in self.rows[name])
        return [row[row != IGNORE] for row in rows]

    def _words(self, ids: Any) -> str:
        words = self._tokenizer.batch_decode(ids[:, None])
        return " · ".join(word.strip() for word in words)


class Numbers(Measure):
    """Predicted numbers, beside the true ones and the teacher's."""

    def columns(self, outputs: Outputs) -> dict[str, Tensor]:
        """See `Measure.columns`: (rows, numbers), NaN where there is no label."""
        shape = outputs.labels.shape
        true = outputs.labels.flatten().where(outputs.labelled, torch.nan).view(shape)
        found = {"predictions": outputs.student.float().view(shape), "references": true}
        if outputs.teacher is not None:
            found["teacher"] = outputs.teacher.float().view(shape)
        return found

    def figures(self) -> dict[str, float]:
        """See `Measure.figures`. Several numbers of a row count as several rows."""
        columns = {name: np.asarray(rows).ravel() for name, rows in self.rows.items()}
        said, true = columns["predictions"], columns["references"]
        known = ~np.isnan(true)
        found: dict[str, float] = {"targets": len(said)}
        found |= task_metrics.Regression().compute(predictions=said[known], references=true[known])
        if "teacher" in columns:
            squares = (said - columns["teacher"]) ** 2
            found["mse_to_teacher"] = math.fsum(squares) / len(squares)
        return found

    def predictions(self) -> Predictions:
        """See `Measure.predictions`. The score is 1 minus the mean squared error of the row."""
        said, true = (np.asarray(self.rows[name]) for name in ("predictions", "references"))
        scores = 1 - ((said - true) ** 2).mean(1)
        return Predictions([*map(_numbers, said)], [*map(_numbers, true)], scores.tolist())


class Answers(Measure):
    """The answer to each question, over all windows of its context.

    windows: rows with `row`, `offsets` and `answer_mask`, see `tokenize_questions`
    questions: rows as `read_questions` reads them
    """

    def __init__(self, windows: Any, questions: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        names = getattr(windows, "column_names", None) or list(windows[0])
        missing = [name for name in ("row", "offsets", ANSWER_MASK) if name not in names]
        if missing:
            raise InputError(
                f"the windows have no {', '.join(missing)}, so answers cannot be found in their "
                "contexts: make them with hf_distill.data.tokenize_questions"
            )
        rows = questions if isinstance(questions, Dataset) else Dataset.from_list(list(questions))
        self._questions, self._windows = read_questions(rows), windows
        self._check_references()
        self._cls = tokenizer.cls_token_id

    def _check_references(self) -> None:
        """InputError unless the windows are those of all questions, and lie in their contexts."""
        windows, contexts = self._windows, self._questions["context"]
        of_rows = set(windows["row"] if isinstance(windows, Dataset) else _each(windows, "row"))
        fitting = of_rows == set(range(len(contexts))) and all(
            max(end for _, end in window["offsets"]) <= len(contexts[window["row"]])
            for window in windows
        )
        if not fitting:
            raise InputError(
                f"the rows are windows of {len(of_rows)} questions, but the {len(contexts)} "
                "references are not these: give the questions that the rows were made from, in "
                "their order"
            )

    def columns(self, outputs: Outputs) -> dict[str, Tensor]:
        """See `Measure.columns` and `best_spans`."""
        ids, attended = outputs.batch["input_ids"], outputs.batch.get("attention_mask")
        allowed = outputs.batch[ANSWER_MASK] != 0
        allowed = allowed if attended is None else allowed & (attended != 0)
        # As the windows were made: the first token where there is no CLS.
        none = (ids == (-1 if self._cls is None else self._cls)).int().argmax(1)
        logits = outputs.student.view(len(ids), 2, -1)
        return best_spans(logits, allowed.scatter(1, none[:, None], False), none)

    def answers(self) -> list[str]:
        """The answer to each question, "" for none."""
        windows = self._windows
        question_of = windows["row"] if isinstance(windows, Dataset) else _each(windows, "row")
        return answers(
            self.rows,
            question_of,
            lambda window: windows[window]["offsets"],
            self._questions["context"],
            may_be_none=not all(self.references()),
        )

    def references(self) -> list[list[str]]:
        """The accepted answers to each question."""
        return [accepted["text"] for accepted in self._questions["answers"]]

    def figures(self) -> dict[str, float]:
        """See `Measure.figures`."""
        return task_metrics.QuestionAnswering().compute(
            predictions=self.answers(), references=self.references()
        )

    def predictions(self) -> Predictions:
        """See `Measure.predictions`; one for each question, whose score is its F1."""
        said, accepted = self.answers(), self.references()
        pairs = zip(said, accepted, strict=True)
        return Predictions(
            [text or NO_ANSWER for text in said],
            [" / ".join(dict.fromkeys(texts)) or NO_ANSWER for texts in accepted],
            [task_metrics.answer_scores(text, texts)[1] for text, texts in pairs],
        )


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


def _each(rows: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    return [row[name] for row in rows]


class Evaluation(dict[str, float]):
    """The figures of a model, by name, and its predictions for each row."""

    def __init__(self, figures: Mapping[str, float], measures: Sequence[Measure] = ()) -> None:
        super().__init__(figures)
        self._measures = measures

    @cached_property
    def predictions(self) -> Predictions | None:
        """The predictions for each row (for windows, for each question).

        None for causal language modelling, for an encoder-decoder without `generate`, and for
        question answering without `references`.
        """
        found = (measure.predictions() for measure in self._measures)
        return next((one for one in found if one is not None), None)


def task_measures(
    pair: Pair,
    tokenizer: PreTrainedTokenizerBase,
    shared: int,
    dataset: Any,
    references: Any = None,
) -> list[Measure]:
    """The measures of a task.

    shared: see `row_sums`; dataset: the rows
    references: for question answering the questions that the rows are windows of
    """
    task = pair.task
    if isinstance(task, SequenceClassification) and task.problem == NUMBERS:
        return [Numbers()]
    found: list[Measure] = [Distributions(task, tokenizer, shared)]
    if isinstance(task, SequenceClassification | TokenClassification):
        found.append(Classes(task, model_labels(task, base_model(pair.plain).config).names))
    if isinstance(task, MaskedLM):
        found.append(MaskedTokens(tokenizer))
    if isinstance(task, QuestionAnswering) and references is not None:
        found.append(Answers(dataset, references, tokenizer))
    return found


def _refuse_non_finite(sums: Mapping[str, Tensor], rows_before: int) -> None:
    for name, what in (("nll", "model's loss"), ("kl", "KL to the teacher")):
        if name in sums and not sums[name].isfinite().all():
            row = int((~sums[name].isfinite()).nonzero()[0])
            raise InputError(
                f"the {what} is {sums[name][row].item()} in evaluation row {rows_before + row}: "
                "the weights have diverged, or their dtype is too narrow (load the model in "
                "float32 or bfloat16)"
            )
