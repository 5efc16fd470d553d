"""SQuAD's metric by hand, its threshold by trying all, its spans by a slow reference."""

import random

import numpy as np
import pytest

from weightlora.tasks._squad_metric import (
    MAX_ANSWER_TOKENS,
    N_BEST,
    Span,
    Window,
    best_span,
    best_threshold,
    exact_match,
    f1,
    normalise,
    null_score,
    squad_scores,
    squad_v2_scores,
)

# -- the metric ------------------------------------------------------------------------------------------------------


def test_normalise_drops_case_punctuation_articles_and_blanks():
    assert normalise("  The\tcat, an  a-nt & A.N. Other's theatre ") == "cat ant others theatre"


@pytest.mark.parametrize(
    ("prediction", "golds", "exact", "overlap"),
    [
        ("the Eiffel Tower.", ["Eiffel tower"], 1, 1),
        ("Tower", ["Eiffel Tower"], 0, 2 / 3),  # P = 1, R = 1/2
        ("in the year 1889", ["1889", "year 1889"], 0, 4 / 5),  # best gold: P = 2/3, R = 1; the other gives 1/2
        ("no no no", ["no, no"], 0, 4 / 5),  # a word counts as often as both have it
        ("Paris", ["London", "paris!"], 1, 1),
        ("Paris", ["London"], 0, 0),
        ("", [], 1, 1),
        ("Paris", [], 0, 0),
        ("", ["Paris"], 0, 0),
        ("", ["the"], 1, 1),  # v2.0: a gold without words is no answer
        ("Paris", ["the", "Paris"], 1, 1),
    ],
)
def test_exact_match_and_f1_by_hand(prediction, golds, exact, overlap):
    assert exact_match(prediction, golds) == exact
    assert f1(prediction, golds) == pytest.approx(overlap)


def test_scores_are_means():
    scores = squad_scores(["the tower", "in Paris", "red"], [["tower"], ["Paris"], ["blue"]])
    assert scores == pytest.approx({"exact_match": 1 / 3, "f1": (1 + 2 / 3 + 0) / 3})


def test_no_answer_threshold_by_hand():
    """Differences −2, 2 and ½: at threshold 0 only the first is answered, and so it is at the best one, −2."""
    spans = [Span("Paris", 3.0), Span("dark red", 2.0), Span("x", 1.0)]
    scores = squad_v2_scores(spans, [1.0, 4.0, 1.5], [["Paris"], ["red"], []])
    assert scores == pytest.approx(
        {
            "exact_match": 2 / 3,  # Paris, and silence about the third
            "f1": 2 / 3,
            "best_exact_match": 2 / 3,  # answering all would give Paris alone
            "best_f1": 2 / 3,  # answering all: 1 + 2/3 + 0
            "best_threshold": -2.0,
        }
    )


def test_a_better_threshold_is_found_where_the_null_scores_are_too_high():
    spans = [Span("Paris", 3.0), Span("red", 2.0), Span("x", 1.0)]
    scores = squad_v2_scores(spans, [7.0, 5.0, 9.0], [["Paris"], ["red"], []])
    assert scores["exact_match"] == pytest.approx(1 / 3)
    assert (scores["best_exact_match"], scores["best_f1"], scores["best_threshold"]) == (1, 1, 4)


@pytest.mark.parametrize("seed", range(30))
def test_best_threshold_by_trying_all(seed):
    draw = random.Random(seed)
    count = draw.randint(1, 12)
    answered = [draw.randint(0, 4) / 4 for _ in range(count)]
    silent = [float(draw.randint(0, 1)) for _ in range(count)]
    differences = [float(draw.randint(-3, 3)) for _ in range(count)]  # with ties

    def mean_at(threshold):
        chosen = [a if d <= threshold else s for a, s, d in zip(answered, silent, differences, strict=True)]
        return sum(chosen) / count

    best, threshold = best_threshold(answered, silent, differences)
    assert best == pytest.approx(max(mean_at(t) for t in [min(differences) - 1, *differences]))
    assert mean_at(threshold) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(10))
def test_best_threshold_is_the_official_one_where_no_two_are_equal(seed):
    """The loop is find_best_thresh of evaluate-v2.0.py, which walks over the questions by their probability."""
    draw = random.Random(seed)
    has_answer = [draw.random() < 0.5 for _ in range(9)]
    scores = [draw.randint(1, 4) / 4 if has else 0.0 for has in has_answer]
    na_probs = draw.sample(range(100), 9)
    current = best = sum(not has for has in has_answer)
    for i in sorted(range(9), key=lambda k: na_probs[k]):
        current += scores[i] if has_answer[i] else -1
        best = max(best, current)
    ours, _ = best_threshold(scores, [float(not has) for has in has_answer], [float(p) for p in na_probs])
    assert ours == pytest.approx(best / 9)


# -- from logits to spans --------------------------------------------------------------------------------------------


def slow_best(context, windows):
    """Every candidate of every window in one list, the largest first, as postprocess_qa_predictions has it."""
    candidates = []
    for window in windows:
        starts, ends = (np.argsort(x)[::-1][:N_BEST] for x in (window.start_logits, window.end_logits))
        for s in starts:
            for e in ends:
                if window.offsets[s] is None or window.offsets[e] is None or e < s or e - s + 1 > MAX_ANSWER_TOKENS:
                    continue
                text = context[window.offsets[s][0] : window.offsets[e][1]]
                candidates.append((window.start_logits[s] + window.end_logits[e], text))
    return max(candidates)


def random_windows(seed):
    draw = np.random.default_rng(seed)
    return [
        Window(
            draw.normal(size=60).tolist(),
            draw.normal(size=60).tolist(),
            [None] * 6 + [(begin + i, begin + i + 1) for i in range(53)] + [None],
            cls=0,
        )
        for begin in (0, 40, 80)
    ]


CHARACTERS = "".join(chr(0x4E00 + i) for i in range(140))  # all different: a text tells its place


@pytest.mark.parametrize("seed", range(20))
def test_best_span_is_that_of_a_slow_reference(seed):
    windows = random_windows(seed)
    score, text = slow_best(CHARACTERS, windows)
    assert best_span(CHARACTERS, windows) == Span(text, score)


def peaks(start, end, size=60):
    return Window(
        [9.0 if i == start else 0.0 for i in range(size)],
        [9.0 if i == end else 0.0 for i in range(size)],
        [None, *((i, i + 1) for i in range(size - 1))],
        cls=0,
    )


@pytest.mark.parametrize(
    ("start", "end", "score"),
    [(5, 5 + MAX_ANSWER_TOKENS - 1, 18), (5, 5 + MAX_ANSWER_TOKENS, 9), (8, 5, 9), (0, 4, 9)],
    ids=["longest", "too long", "backwards", "outside of the context"],
)
def test_only_real_spans_are_taken(start, end, score):
    assert best_span(CHARACTERS, [peaks(start, end)]).score == score


def test_only_the_twenty_largest_logits_are_looked_at():
    """Of the whole window, as in run_squad.py: twenty tokens of the question can crowd the context out."""
    offsets = [None] * N_BEST + [(0, 4)]
    crowded = Window([5.0] * N_BEST + [4.0], [0.0] * N_BEST + [4.0], offsets, cls=0)
    assert best_span("text", [crowded]) == Span("", 0.0)
    assert best_span("text", [Window(crowded.end_logits, crowded.end_logits, offsets, cls=0)]) == Span("text", 8.0)


def test_a_window_without_a_span_gives_an_empty_answer():
    nothing = Window([1.0, 2.0], [1.0, 2.0], [None, None], cls=0)
    assert best_span("text", [nothing]) == Span("", 0.0)


def test_the_null_score_is_the_smallest():
    assert null_score([peaks(0, 0), peaks(5, 6), peaks(0, 6)]) == 0
    assert null_score([peaks(0, 0), peaks(0, 6)]) == 9
