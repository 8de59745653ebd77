"""Find the answers of extractive question answering, in the windows of long contexts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hf_distill.losses.targets import accumulator

MAX_ANSWER_TOKENS = 30  # as in the evaluation script of SQuAD that transformers has


def best_spans(
    logits: Tensor, allowed: Tensor, no_answer: Tensor, max_tokens: int = MAX_ANSWER_TOKENS
) -> dict[str, Tensor]:
    """The likeliest span of each window, and how likely it is that there is no answer.

    logits: (rows, 2, positions), of start and end
    allowed: (rows, positions) bool, where an answer may be
    no_answer: (rows,) int64, the position that stands for no answer
    max_tokens: most tokens of an answer. All spans up to this length are considered
    returns: (rows,) `start` and `end`, int64, -1 where no position is allowed; `span_score`, the
        sum of both logits, and `no_answer_score`
    """
    wide = logits.to(accumulator(logits))
    begin, finish = wide.masked_fill(~allowed[:, None], -torch.inf).unbind(1)
    rows, positions = begin.shape
    best = begin.new_full((rows,), -torch.inf)
    start = torch.full((rows,), -1, device=logits.device)
    end = start.clone()
    for further in range(min(max_tokens, positions)):
        sums = begin[:, : positions - further] + finish[:, further:]
        found, place = sums.max(dim=1)
        better = found > best
        best = torch.where(better, found, best)
        start = torch.where(better, place, start)
        end = torch.where(better, place + further, end)
    nothing = wide.gather(2, no_answer[:, None, None].expand(-1, 2, 1)).sum((1, 2))
    return {"start": start, "end": end, "span_score": best, "no_answer_score": nothing}


def answers(
    found: Mapping[str, Sequence[float]],
    question_of: Sequence[int],
    offsets_of: Callable[[int], Sequence[Sequence[int]]],
    contexts: Sequence[str],
    *,
    may_be_none: bool,
) -> list[str]:
    """The answer to each question: the best span of all its windows; "" for no answer.

    found: as `best_spans` gives it, one value a window
    question_of: the index of each window's question
    offsets_of: the characters of a window's tokens, see `tokenize_questions`
    contexts: of the questions
    may_be_none: whether a question may have no answer, as in SQuAD 2.0. The answer is then "" if
        the smallest no-answer score of the windows is above the score of the best span
    """
    best: dict[int, tuple[float, int]] = {}
    nothing: dict[int, float] = {}
    scores = zip(question_of, found["span_score"], found["no_answer_score"], strict=True)
    for window, (question, score, none) in enumerate(scores):
        if question not in best or score > best[question][0]:
            best[question] = score, window
        nothing[question] = min(nothing.get(question, none), none)
    texts = []
    for question, context in enumerate(contexts):
        score, window = best.get(question, (-math.inf, 0))
        if score == -math.inf or (may_be_none and nothing[question] > score):
            texts.append("")
            continue
        offsets = offsets_of(window)
        first, last = (int(found[name][window]) for name in ("start", "end"))
        texts.append(context[offsets[first][0] : offsets[last][1]])
    return texts
