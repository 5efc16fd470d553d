"""Standard errors and agreement of scores: closed forms, scipy, and random rankings as the control."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from weightlora.errors import WeightLoraWarning
from weightlora.selection._kept import agreement_of, rank_correlation
from weightlora.selection.rules.base import jackknife


def test_of_a_mean_the_error_is_the_usual_one():
    torch.manual_seed(0)
    batches = torch.randn(8, 5, dtype=torch.float64)
    found = jackknife(lambda chosen: batches[list(chosen)].mean(0), 8)
    assert found.scores == pytest.approx(batches.mean(0).tolist())
    assert found.errors == pytest.approx((batches.std(0) / 8**0.5).tolist())
    assert found.halves[0] == pytest.approx(batches[::2].mean(0).tolist())
    assert found.halves[1] == pytest.approx(batches[1::2].mean(0).tolist())


def test_of_the_size_of_a_mean_it_is_the_spread_over_new_batches():
    """|mean of 8 numbers around 3|: the standard error of a mean of 8 with a standard deviation of 1 is 0.354."""
    torch.manual_seed(0)
    batches = 3 + torch.randn(8, 4000, dtype=torch.float64)
    errors = torch.tensor(jackknife(lambda chosen: batches[list(chosen)].mean(0).abs(), 8).errors)
    assert errors.square().mean().sqrt().item() == pytest.approx(8**-0.5, rel=0.02)


@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=2, max_size=12))
def test_the_rank_correlation_is_scipys(pairs):
    a, b = zip(*pairs, strict=True)
    constant = len(set(a)) == 1 or len(set(b)) == 1
    expected = 0.0 if constant else spearmanr(a, b).statistic
    assert rank_correlation(a, b) == pytest.approx(expected, abs=1e-9)


def test_scores_that_two_halves_rank_alike_are_trusted_and_random_ones_are_not():
    scores, shuffled = list(range(30)), list(range(30))
    noisy = [score + 6 * (-1) ** score for score in scores]
    assert agreement_of((scores, noisy)) > 0.8
    random.Random(1).shuffle(shuffled)  # a correlation of −0.2
    with pytest.warns(WeightLoraWarning, match="these scores cannot tell the sites apart.*a random choice"):
        assert agreement_of((scores, shuffled)) == pytest.approx(spearmanr(scores, shuffled).statistic)
    assert agreement_of((scores[:9], scores[:9][::-1])) == pytest.approx(-1)  # too few sites to say anything
