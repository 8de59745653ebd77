"""ROUGE, BLEU and chrF against the libraries' own results and figures worked out by hand."""

from __future__ import annotations

import math
import socket
from typing import Any

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from hf_distill import InputError
from hf_distill.evaluation import Bleu, ChrF, Rouge

PREDICTIONS = [
    "the cat sat on the mat",
    "a dog barked",
    "",
    "El gato se sienta.\nY duerme.",
]
REFERENCES = [
    "the cat lay on the mat",
    "the dogs barked loudly",
    "nothing was written here",
    "El gato está sentado.\nDuerme.",
]
METRICS = (Rouge, Bleu, ChrF)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a metric opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_rouge_by_hand() -> None:
    """Of six words each five are shared; of five pairs of words three; the longest run is five."""
    found = Rouge().compute(predictions=PREDICTIONS[:1], references=REFERENCES[:1])
    assert found["rouge1"] == pytest.approx(5 / 6)
    assert found["rouge2"] == pytest.approx(3 / 5)
    assert found["rougeL"] == pytest.approx(5 / 6)


def test_rouge_is_the_mean_of_rows_that_the_library_gives() -> None:
    for stem in (False, True):
        found = Rouge().compute(predictions=PREDICTIONS, references=REFERENCES, use_stemmer=stem)
        scorer = RougeScorer(list(found), use_stemmer=stem)
        for name, value in found.items():
            rows = [
                scorer.score(true, said)[name].fmeasure
                for said, true in zip(PREDICTIONS, REFERENCES, strict=True)
            ]
            assert value == pytest.approx(sum(rows) / 4)
    assert (
        found["rouge1"] > Rouge().compute(predictions=PREDICTIONS, references=REFERENCES)["rouge1"]
    )  # "dog" is the stem of "dogs"


def test_rouge_of_other_scripts() -> None:
    """Words of Russian; each character of Chinese; accents do not change the script."""
    found = Rouge().compute(predictions=["кошка спит тут"], references=["кошка спит там"])
    assert found["rouge1"] == pytest.approx(2 / 3)
    found = Rouge().compute(predictions=["我喜欢猫"], references=["我喜欢狗"])
    assert found["rougeL"] == pytest.approx(3 / 4)
    plain = Rouge().compute(predictions=["el niño"], references=["el nino"])
    assert plain["rouge1"] == pytest.approx(2 / 5), "as the original implementation: el, ni, o"


def test_bleu_by_hand() -> None:
    """Precisions 8/9, 7/8, 6/7, 5/6; nine tokens for a reference of ten."""
    said, true = "a b c d e f g h i", "a b c d e f g h j k"
    found = Bleu().compute(predictions=[said], references=[true])
    precision = (8 / 9 * 7 / 8 * 6 / 7 * 5 / 6) ** (1 / 4)
    brevity = math.exp(1 - 10 / 9)
    assert found["bleu"] == pytest.approx(100 * precision * brevity)
    assert found["brevity_penalty"] == pytest.approx(brevity)


def test_bleu_and_chrf_are_those_of_sacrebleu() -> None:
    options: dict[str, Any]
    for options in ({}, {"lowercase": True}, {"tokenize": "char"}):
        found = Bleu().compute(predictions=PREDICTIONS, references=REFERENCES, **options)
        assert found["bleu"] == sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES], **options).score
    for order in (0, 2):
        found = ChrF().compute(predictions=PREDICTIONS, references=REFERENCES, word_order=order)
        wanted = sacrebleu.corpus_chrf(PREDICTIONS, [REFERENCES], word_order=order).score
        assert found["chrf"] == wanted


@pytest.mark.parametrize("metric", METRICS)
def test_the_best_of_several_references_counts(metric: type[Rouge]) -> None:
    wrong = "quite another sentence altogether"
    said = ["the cat sat on the mat", "a dog barked at me today"]
    found = metric().compute(predictions=said, references=[[wrong, said[0]], [said[1]]])
    exact = metric().compute(predictions=said, references=said)
    assert found == pytest.approx(exact)
    assert max(exact.values()) in (1, pytest.approx(100))


@pytest.mark.parametrize("metric", METRICS)
def test_batches_give_what_all_rows_give(metric: type[Rouge]) -> None:
    whole = metric().compute(predictions=PREDICTIONS, references=REFERENCES)
    batched = metric()
    for at in (0, 2):
        part = slice(at, at + 2)
        batched.add_batch(predictions=PREDICTIONS[part], references=REFERENCES[part])
    assert batched.compute() == whole


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "no predictions"),
        (["a"], ["a", "b"], "1 predictions and 2 references"),
        (["a", "b"], [["a"], []], "row 1 has no reference"),
    ],
)
def test_bad_rows_are_one_clear_line(
    metric: type[Rouge], predictions: Any, references: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        metric().compute(predictions=predictions, references=references)
    assert "\n" not in str(caught.value)
