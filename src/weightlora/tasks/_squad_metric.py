"""SQuAD's official numbers: from logits to the best span, from spans to exact match and F1.

The numbers are those of ``evaluate-v1.1.py`` and ``evaluate-v2.0.py`` (rajpurkar.github.io/SQuAD-explorer), the spans
those of BERT's ``run_squad.py``, which transformers' ``run_qa.py`` follows.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nlargest
from itertools import groupby, product

#: The constants of ``run_squad.py``: candidates for each end of a span, and the most tokens of an answer.
N_BEST = 20
MAX_ANSWER_TOKENS = 30

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Window:
    """One piece of a long context, as the model saw it."""

    start_logits: Sequence[float]
    end_logits: Sequence[float]
    offsets: Sequence[Sequence[int] | None]
    """First and last + 1 character of each token in the whole context; None for a token outside it."""
    cls: int
    """The token whose logits mean "no answer here"."""


@dataclass(frozen=True)
class Span:
    """An answer that the model found, and the sum of its two logits."""

    text: str
    score: float


def best_span(context: str, windows: Sequence[Window]) -> Span:
    """Return the span with the largest sum of logits over all windows; an empty one where no span is possible."""
    best: tuple[float, int, int] | None = None
    for window in windows:
        offsets = window.offsets
        for start, end in product(_largest(window.start_logits), _largest(window.end_logits)):
            first, last = offsets[start], offsets[end]
            if first is None or last is None or not start <= end < start + MAX_ANSWER_TOKENS or first[0] == last[1]:
                continue
            score = window.start_logits[start] + window.end_logits[end]
            if best is None or score > best[0]:
                best = (score, first[0], last[1])
    return Span("", 0.0) if best is None else Span(context[best[1] : best[2]], best[0])


def _largest(logits: Sequence[float]) -> list[int]:
    return nlargest(N_BEST, range(len(logits)), key=logits.__getitem__)


def null_score(windows: Sequence[Window]) -> float:
    """Return the score of "no answer", the smallest of the windows: one window with an answer is enough."""
    return min(window.start_logits[window.cls] + window.end_logits[window.cls] for window in windows)


def normalise(text: str) -> str:
    """Return the text in lower case, without punctuation and articles, words separated by one blank.

    Example:
        >>> normalise("The  Eiffel-Tower, (a tower)!")
        'eiffeltower tower'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """Return 1 if the prediction equals one of the answers up to case, punctuation and articles, else 0.

    Args:
        prediction: An answer; empty means that there is none.
        golds: All right answers; without any, or with empty ones only, the question has no answer.
    """
    return float(any(normalise(prediction) == normalise(gold) for gold in _answers(golds)))


def f1(prediction: str, golds: Sequence[str]) -> float:
    """Return the best F1, in [0, 1], of the prediction's words with those of any answer; arguments as above.

    An answer of articles alone, such as ``"A"``, counts as in v2.0; v1.1 gives it 0 even if it is found.
    """
    return max(_word_f1(normalise(prediction).split(), normalise(gold).split()) for gold in _answers(golds))


def _word_f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:  # an empty answer is right only if there is none
        return float(found == wanted)
    common = (Counter(found) & Counter(wanted)).total()
    return 2 * common / (len(found) + len(wanted))  # = 2PR / (P + R) with P = common / found and R = common / wanted


def _answers(golds: Sequence[str]) -> Sequence[str]:
    return [gold for gold in golds if normalise(gold)] or [""]


def best_threshold(
    answered: Sequence[float], silent: Sequence[float], differences: Sequence[float]
) -> tuple[float, float]:
    """Return the best mean score over all no-answer thresholds, and that threshold.

    This is ``find_best_thresh`` of the official script, except that questions of equal difference stay together: no
    threshold can separate them.

    Args:
        answered: Score of each question if its span is given.
        silent: Score of each question if no answer is given.
        differences: Null score minus the span's score. A question is answered if this is at most the threshold.
    """
    order = sorted(range(len(differences)), key=differences.__getitem__)
    total = best = sum(silent)
    threshold = differences[order[0]] - 1.0  # below all of them: no question is answered
    for difference, tied in groupby(order, key=differences.__getitem__):
        total += sum(answered[i] - silent[i] for i in tied)
        if total > best:
            best, threshold = total, difference
    return best / len(order), threshold


def squad_scores(predictions: Sequence[str], golds: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return ``exact_match`` and ``f1``, each in [0, 1], the mean over all questions."""
    pairs = list(zip(predictions, golds, strict=True))
    return {metric.__name__: sum(metric(*pair) for pair in pairs) / len(pairs) for metric in (exact_match, f1)}


def squad_v2_scores(spans: Sequence[Span], nulls: Sequence[float], golds: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the scores at threshold 0, and ``best_exact_match`` and ``best_f1``, each at its own best threshold.

    ``best_threshold`` belongs to F1, the leaderboard's metric.

    Args:
        spans: What :func:`best_span` found for each question.
        nulls: The :func:`null_score` of each question.
        golds: The right answers of each question.
    """
    differences = [null - span.score for span, null in zip(spans, nulls, strict=True)]
    given = ["" if difference > 0 else span.text for span, difference in zip(spans, differences, strict=True)]
    scores = squad_scores(given, golds)
    for metric in (exact_match, f1):  # the threshold of F1, the last, is kept
        answered = [metric(span.text, gold) for span, gold in zip(spans, golds, strict=True)]
        silent = [metric("", gold) for gold in golds]
        best, scores["best_threshold"] = best_threshold(answered, silent, differences)
        scores[f"best_{metric.__name__}"] = best
    return scores
