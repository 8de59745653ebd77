"""`evaluate` metrics of summaries and translations: ROUGE, BLEU and chrF. No network is needed.

The scores are those of `rouge-score` and `sacrebleu`, on their own scales.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from typing import Any

from hf_distill.evaluation.pairs import TextMetric, listed

ROUGES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Rouge(TextMetric):
    """`rouge1`, `rouge2`, `rougeL`, `rougeLsum`: mean F-measure of the rows, 0 to 1.

    Of several references of a row the best counts. `rougeLsum` takes sentences from lines: separate
    them by newlines. Option `use_stemmer`: compare the stems of English words (Porter). See
    `rouge_scorer` for what a word is.
    Source: Lin, ROUGE, 2004.
    """

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[str | Sequence[str]],
        use_stemmer: bool = False,
    ) -> dict[str, float]:
        accepted = listed(references)
        scorer = rouge_scorer(ROUGES, accepted, use_stemmer=use_stemmer)
        scores = [
            scorer.score_multi(texts, prediction)
            for texts, prediction in zip(accepted, predictions, strict=True)
        ]
        return {name: statistics.fmean(row[name].fmeasure for row in scores) for name in ROUGES}


def rouge_scorer(
    names: Sequence[str], references: Sequence[Sequence[str]], *, use_stemmer: bool = False
) -> Any:
    """A `RougeScorer` whose words fit the references.

    All but a-z and 0-9 separates words, as in the original implementation, unless most letters of
    the references are not of the Latin alphabet. Then words are sequences of letters and digits of
    any script, and each character of a script without spaces is a word.
    """
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk, half a second

    letters = [char for texts in references for text in texts for char in text if char.isalpha()]
    latin = sum(char < "\u0250" for char in letters) * 2 >= len(letters)
    return RougeScorer(names, use_stemmer=use_stemmer, tokenizer=None if latin else _Words())


# Scripts without spaces between words: Thai, Lao, Burmese, Khmer, kana, CJK ideographs.
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"


class _Words:
    _WORD = re.compile(f"[{_SPACELESS}]|[^\\W_{_SPACELESS}]+")

    def tokenize(self, text: str) -> list[str]:
        return self._WORD.findall(text.lower())


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
