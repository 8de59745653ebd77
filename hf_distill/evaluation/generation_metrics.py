"""`evaluate` metrics of summaries and translations: ROUGE, BLEU and chrF. No network is needed.

The scores are those of `rouge-score` and `sacrebleu`, on their own scales.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from hf_distill.evaluation.pairs import TextMetric, listed

ROUGES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Rouge(TextMetric):
    """`rouge1`, `rouge2`, `rougeL`, `rougeLsum`: mean F-measure of the rows, 0 to 1.

    Of several references of a row the best counts. `rougeLsum` takes sentences from lines: separate
    them by newlines. Option `use_stemmer`: compare the stems of English words (Porter). All but
    a-z and 0-9 separates words, as in the original implementation.
    Source: Lin, ROUGE, 2004.
    """

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[str | Sequence[str]],
        use_stemmer: bool = False,
    ) -> dict[str, float]:
        from rouge_score.rouge_scorer import RougeScorer  # imports nltk, half a second

        scorer = RougeScorer(ROUGES, use_stemmer=use_stemmer)
        scores = [
            scorer.score_multi(texts, prediction)
            for texts, prediction in zip(listed(references), predictions, strict=True)
        ]
        return {name: statistics.fmean(row[name].fmeasure for row in scores) for name in ROUGES}


class Bleu(TextMetric):
    """`bleu`: corpus BLEU, 0 to 100; `brevity_penalty`: its factor for short text, 0 to 1.

    Options `tokenize` (sacrebleu's: "13a" by default, "zh", "intl", "char", ...) and `lowercase`.
    Source: Post, A Call for Clarity in Reporting BLEU Scores, arXiv:1804.08771.
    """

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[str | Sequence[str]],
        tokenize: str | None = None,
        lowercase: bool = False,
    ) -> dict[str, float]:
        from sacrebleu.metrics import BLEU

        scorer = BLEU(tokenize=tokenize, lowercase=lowercase)
        found = scorer.corpus_score(list(predictions), _streams(references))
        return {"bleu": found.score, "brevity_penalty": found.bp}


class ChrF(TextMetric):
    """`chrf`: corpus F-score of character sequences, 0 to 100.

    Options `word_order` (2 for chrF++, 0 by default) and `lowercase`.
    Source: Popović, chrF, 2015.
    """

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[str | Sequence[str]],
        word_order: int = 0,
        lowercase: bool = False,
    ) -> dict[str, float]:
        from sacrebleu.metrics import CHRF

        scorer = CHRF(word_order=word_order, lowercase=lowercase)
        return {"chrf": scorer.corpus_score(list(predictions), _streams(references)).score}


def _streams(references: Sequence[str | Sequence[str]]) -> Any:
    """The first references of all rows, then the second ones, ...; None where a row has fewer."""
    by_row = listed(references)
    most = max(map(len, by_row))
    return [[texts[i] if i < len(texts) else None for texts in by_row] for i in range(most)]
