"""Measure models of other tasks than causal language modelling: their own metrics, and examples."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from sacrebleu.metrics import CHRF
from torch import Tensor
from torch.utils.data import DataLoader

from hf_distill.data import Labels
from hf_distill.data.prompts import for_languages
from hf_distill.evaluation import (
    Bleu,
    ChrF,
    Classification,
    MultiLabelClassification,
    QuestionAnswering,
    Regression,
    Rouge,
    TokenClassification,
    evaluate_student,
)
from hf_distill.evaluation.performance import size
from hf_distill.evaluation.task_metrics import normalized_answer
from hf_distill.losses.targets import IGNORE
from hf_distill.models.base import base_model
from hf_distill.models.vocabulary import shared_vocabulary
from hf_distill.recipes.stages.models import collator_of, labels_of, rows_of, text_of, tokenizer_of
from hf_distill.recipes.stages.stage import Run
from hf_distill.tasks import find_task, named_task
from hf_distill.tasks.question_answering import ANSWER_MASK, IMPOSSIBLE
from hf_distill.teachers import LiveTeacher

# The most tokens of an answer, as in the evaluation of SQuAD models elsewhere.
ANSWER_TOKENS = 30
# The figures of `evaluate_student` that mean something for each task.
OF_CLASSES = ("ce", "kl_to_teacher", "top1_agreement", "calibration_error", "targets")
OF_TOKENS = ("perplexity", *OF_CLASSES)
KEPT = {
    "seq2seq-lm": OF_TOKENS,
    "masked-lm": OF_TOKENS,
    "sequence-classification": OF_CLASSES,
    "token-classification": OF_CLASSES,
}


@dataclass(frozen=True)
class Judged:
    """What a model predicts for the held-out rows.

    figures: the metrics of the task
    texts: each row's prediction in words
    scores: how good it is, 1 where it is right
    """

    figures: dict[str, float]
    texts: list[str]
    scores: list[float]


@dataclass
class TaskMeasure:
    """Measures one model of a run after the other. Call it with a role and its model."""

    run: Run
    teacher: LiveTeacher
    accelerator: Accelerator
    judged: dict[str, Judged] = field(default_factory=dict)
    split: str = "eval"

    def __post_init__(self) -> None:
        self._recipe = self.run.recipe
        self._tokenizer: Any = tokenizer_of(self.run)
        self._tokens = rows_of(self.run, self.split)
        self._texts = text_of(self.run, self.split)
        self._labels = labels_of(self.run)
        self._collate = collator_of(self._recipe, self._tokenizer)

    def __call__(self, role: str, model: Any) -> dict[str, float]:
        """The figures of a model, the same on every process."""
        figures = self._beside_the_teacher(model)
        model.eval().to(self.accelerator.device)
        start = time.perf_counter()
        judged = self._judge(model)
        seconds = time.perf_counter() - start
        self.judged[role] = judged
        figures = {**judged.figures, **figures}
        if "teacher" in self.judged and "top1_agreement" not in figures and judged.texts:
            same = zip(map(normalized_answer, judged.texts), self._of_teacher, strict=True)
            if self._recipe.task == "question-answering":
                figures["top1_agreement"] = sum(a == b for a, b in same) / len(judged.texts)
        if self._recipe.evaluate.speed and self._recipe.task != "masked-lm":
            figures["rows_per_s"] = len(self._texts) / seconds
        return {**figures, **size(base_model(model))}

    @property
    def _of_teacher(self) -> list[str]:
        return [normalized_answer(text) for text in self.judged["teacher"].texts]

    def examples(self, number: int) -> list[dict[str, str]]:
        """Some held-out rows with each model's prediction, those the student gets wrong first."""
        shown = {role: found for role, found in self.judged.items() if role != "initial"}
        scores = shown["student"].scores
        rows = chosen_rows(scores, number)
        found = []
        for row in rows:
            prompt, reference = self._described(row)
            of_models = {role: judged.texts[row] for role, judged in shown.items()}
            found.append({"prompt": prompt, "reference": reference, **of_models})
        return found

    def _beside_the_teacher(self, model: Any) -> dict[str, float]:
        """Cross-entropy, divergence from the teacher, agreement, calibration; by `KEPT`."""
        kept = KEPT.get(self._recipe.task, ())
        if self._labels is not None and self._labels.kind == "regression":
            kept = ()
        if not kept:
            return {}
        outcomes = find_task(model, "model").outcomes(base_model(model))
        if self._recipe.task in ("seq2seq-lm", "masked-lm"):
            outcomes = shared_vocabulary(
                outcomes, self.teacher.rows, self._tokenizer, self.teacher.tokenizer
            )
        found = evaluate_student(
            model,
            self.teacher,
            self._tokens,
            self._tokenizer,
            data_collator=self._collate,
            batch_size=self._recipe.evaluate.batch_size,
            shared_vocabulary=outcomes,
            accelerator=self.accelerator,
            speed=False,
        )
        return {name: found[name] for name in kept if name in found}

    # ---- Predictions ----

    def _judge(self, model: Any) -> Judged:
        judges: Mapping[str, Callable[[Any], Judged]] = {
            "sequence-classification": self._classes,
            "token-classification": self._tags,
            "question-answering": self._answers,
            "seq2seq-lm": self._written,
            "masked-lm": self._filled,
        }
        return judges[self._recipe.task](model)

    def _predict(
        self, model: Any, read: Callable[[dict[str, Any]], list[Any]], rows: Dataset | None = None
    ) -> list[Any]:
        """What `read` finds for each row of tokens, from all processes."""
        data: Any = self._tokens if rows is None else rows
        loader: Any = DataLoader(data, self._recipe.evaluate.batch_size, collate_fn=self._collate)
        found: list[Any] = []
        with torch.no_grad():
            for batch in self.accelerator.prepare_data_loader(loader):
                found += self.accelerator.gather_for_metrics(read(batch), use_gather_object=True)
        return found

    def _inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What a model's forward takes of a batch."""
        task = named_task(self._recipe.task)
        withheld = (*task.label_names, *task.withheld)
        return {name: value for name, value in batch.items() if name not in withheld}

    def _classes(self, model: Any) -> Judged:
        logits = torch.tensor(
            self._predict(model, lambda batch: model(**self._inputs(batch)).logits.tolist())
        )
        labels, true = self._class_labels, self._texts["label"]
        if labels.kind == "regression":
            numbers = logits[:, 0].tolist()
            errors = [-((said - label) ** 2) for said, label in zip(numbers, true, strict=True)]
            figures = Regression().compute(predictions=numbers, references=true)
            return Judged(figures, [f"{number:.3g}" for number in numbers], errors)
        if labels.kind == "several":
            several = (logits > 0).int().tolist()
            figures = MultiLabelClassification().compute(predictions=several, references=true)
            texts = [_named(labels, row) for row in several]
            right = [float(list(map(int, t)) == s) for s, t in zip(several, true, strict=True)]
            return Judged(_by_contract(figures), texts, right)
        said = logits.argmax(-1).tolist()
        figures = Classification().compute(predictions=said, references=true)
        right = [float(one == label) for one, label in zip(said, true, strict=True)]
        return Judged(_by_contract(figures), [labels.names[one] for one in said], right)

    def _tags(self, model: Any) -> Judged:
        def read(batch: dict[str, Any]) -> list[Any]:
            said = model(**self._inputs(batch)).logits.argmax(-1)
            pairs = zip(said, batch["labels"], strict=True)
            return [tags[labels != IGNORE].tolist() for tags, labels in pairs]

        said = self._predict(model, read)
        true = [[tag for tag in row if tag != IGNORE] for row in self._tokens["labels"]]
        figures = TokenClassification().compute(predictions=said, references=true)
        names = self._class_labels.names
        texts = [" ".join(names[tag] for tag in row) for row in said]
        pairs = zip(said, true, strict=True)
        scores = [sum(map(int.__eq__, a, b)) / max(len(b), 1) for a, b in pairs]
        return Judged(_by_contract(figures), texts, scores)

    def _answers(self, model: Any) -> Judged:
        cls = self._tokenizer.cls_token_id

        def read(batch: dict[str, Any]) -> list[Any]:
            outputs = model(**self._inputs(batch))
            is_cls = (batch["input_ids"] == cls) & (batch[ANSWER_MASK] != 0)
            return best_spans(
                outputs.start_logits, outputs.end_logits, batch[ANSWER_MASK] != 0, is_cls
            )

        windows = self._predict(model, read)
        accepted = [answers["text"] for answers in self._texts["answers"]]
        # As in SQuAD 1.1 and 2.0: only where some question has no answer, a model may give none.
        may_give_none = not all(accepted)
        spans: list[tuple[float, str]] = [(float("-inf"), "")] * len(self._texts)
        none = [float("inf")] * len(self._texts)
        contexts, offsets = self._texts["context"], self._tokens["offsets"]
        for window, (score, start, end, none_score) in enumerate(windows):
            row = self._tokens["row"][window]
            none[row] = min(none[row], none_score)
            if score > spans[row][0]:
                first, last = offsets[window][start][0], offsets[window][end][1]
                spans[row] = score, contexts[row][first:last]
        texts = [
            "" if may_give_none and without > score else text
            for (score, text), without in zip(spans, none, strict=True)
        ]
        metric = QuestionAnswering()
        figures = metric.compute(predictions=texts, references=accepted)
        scores = [
            metric.compute(predictions=[text], references=[answers])["f1"] / 100
            for text, answers in zip(texts, accepted, strict=True)
        ]
        return Judged(figures, [text or "(no answer)" for text in texts], scores)

    def _written(self, model: Any) -> Judged:
        data = self._recipe.data
        _, forced = for_languages(self._tokenizer, data.source_lang, data.target_lang)
        settings = {"num_beams": self._recipe.evaluate.num_beams, "do_sample": False, **forced}

        def read(batch: dict[str, Any]) -> list[Any]:
            ids = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=data.max_target_length,
                max_length=None,
                **settings,
            )
            return self._tokenizer.batch_decode(ids, skip_special_tokens=True)

        texts = [text.strip() for text in self._predict(model, read)]
        true = self._texts["target"]
        figures: dict[str, float] = {}
        for metric in (Rouge(), Bleu(), ChrF()):
            found = metric.compute(predictions=texts, references=true)
            figures |= {name: found[name] for name in GENERATED if name in found}
        chrf = CHRF()
        pairs = zip(texts, true, strict=True)
        scores = [chrf.sentence_score(text, [target]).score / 100 for text, target in pairs]
        return Judged(figures, texts, scores)

    def _filled(self, model: Any) -> Judged:
        """Only the rows that are shown: `evaluate_student` has measured all."""

        def read(batch: dict[str, Any]) -> list[Any]:
            said = model(**self._inputs(batch)).logits.argmax(-1)
            pairs = zip(said, batch["labels"], strict=True)
            return [ids[labels != IGNORE].tolist() for ids, labels in pairs]

        said = self._predict(model, read)
        true = [[label for label in row if label != IGNORE] for row in self._tokens["labels"]]
        pairs = list(zip(said, true, strict=True))
        scores = [sum(map(int.__eq__, a, b)) / max(len(b), 1) for a, b in pairs]
        right = sum(sum(map(int.__eq__, a, b)) for a, b in pairs)
        texts = [self._tokens_shown(row) for row in said]
        return Judged({"accuracy": right / max(1, sum(map(len, true)))}, texts, scores)

    def _tokens_shown(self, ids: Sequence[int]) -> str:
        return " · ".join(self._tokenizer.decode([token]).strip() for token in ids)

    @property
    def _class_labels(self) -> Labels:
        assert self._labels is not None  # prepared with the rows
        return self._labels

    def _described(self, row: int) -> tuple[str, str]:
        """A held-out row and its reference, in words."""
        task = self._recipe.task
        if task == "masked-lm":
            tokens = self._tokens[row]
            labels = [label for label in tokens["labels"] if label != IGNORE]
            return self._tokenizer.decode(tokens["input_ids"]), self._tokens_shown(labels)
        text = self._texts[row]
        if task == "seq2seq-lm":
            return text["source"], text["target"]
        if task == "question-answering":
            answers = dict.fromkeys(text["answers"]["text"])
            return f"{text['question']}\n\n{text['context']}", " / ".join(answers) or "(no answer)"
        classes = self._class_labels
        if task == "token-classification":
            return " ".join(text["tokens"]), " ".join(classes.names[tag] for tag in text["tags"])
        prompt = "\n".join(text[name] for name in ("text", "pair") if name in text)
        if classes.kind == "regression":
            return prompt, f"{text['label']:.3g}"
        if classes.kind == "several":
            return prompt, _named(classes, text["label"])
        return prompt, classes.names[text["label"]]


GENERATED = ("rouge1", "rouge2", "rougeL", "bleu", "chrf")


def chosen_rows(scores: Sequence[float], number: int) -> list[int]:
    """Indices of some rows, half of them wrong where there are as many, the worst first.

    scores: of each row, 1 where it is right
    """
    wrong = [row for row, score in enumerate(scores) if score < 1]
    right = [row for row, score in enumerate(scores) if score >= 1]
    of_right = min(len(right), max(number // 2, number - len(wrong)))
    rows = _spread(wrong, number - of_right) + _spread(right, of_right)
    return sorted(rows, key=lambda row: (scores[row], row))


def _spread(rows: list[int], number: int) -> list[int]:
    """Some of the rows, evenly over them."""
    number = min(number, len(rows))
    return [rows[i * len(rows) // number] for i in range(number)]


def best_spans(
    start: Tensor, end: Tensor, allowed: Tensor, is_cls: Tensor
) -> list[tuple[float, int, int, float]]:
    """The best answer of each row: its score, first and last position, and the score of none.

    start, end: (rows, positions) logits, of whose sum the best counts
    allowed, is_cls: (rows, positions) where an answer may be, and where "no answer" is among them
    """
    start = start.float().masked_fill(~allowed, IMPOSSIBLE)
    end = end.float().masked_fill(~allowed, IMPOSSIBLE)
    none = (start + end).masked_fill(~is_cls, IMPOSSIBLE).amax(-1)
    context = allowed & ~is_cls
    ours = start.masked_fill(~context, IMPOSSIBLE)[:, :, None]
    sums = ours + end.masked_fill(~context, IMPOSSIBLE)[:, None, :]
    positions = sums.shape[-1]
    ordered = torch.ones(positions, positions, dtype=torch.bool, device=sums.device).triu()
    ordered &= ordered.new_ones(positions, positions).tril(ANSWER_TOKENS - 1)
    scores, places = sums.masked_fill(~ordered, 2 * IMPOSSIBLE).flatten(1).max(-1)
    first, last = places // positions, places % positions
    return list(zip(*(x.tolist() for x in (scores, first, last, none)), strict=True))


def _named(labels: Labels, row: Sequence[float]) -> str:
    names = [name for name, given in zip(labels.names, row, strict=True) if given]
    return ", ".join(names) or "(none)"


def _by_contract(figures: Mapping[str, float]) -> dict[str, float]:
    """The figures under the names that reports use."""
    names = {"macro_f1": "f1_macro", "micro_f1": "f1_micro"}
    return {names.get(name, name): value for name, value in figures.items()}
