"""A budget spent rank by rank: closed forms, and properties of every budget and score."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig

from weightlora.cost.knapsack import CostBudget, additive_cost
from weightlora.errors import OptionError
from weightlora.model.sites import Site
from weightlora.plan.budget import Budget, chosen_ranks
from weightlora.plan.make import make_plan
from weightlora.plan.ranking import Spread


@given(st.data(), st.integers(1, 60))
def test_ranks_stay_within_the_budget_and_only_positive_ones_are_kept(data, limit):
    n = data.draw(st.integers(1, 6))
    ranks = data.draw(st.lists(st.integers(1, 4), min_size=n, max_size=n))
    widths = data.draw(st.lists(st.integers(1, 5), min_size=n, max_size=n))  # parameters of a rank
    scores = [data.draw(st.lists(st.floats(-1, 1), min_size=r, max_size=r)) for r in ranks]
    costs = tuple(r * width for r, width in zip(ranks, widths, strict=True))
    kept = chosen_ranks(Budget(costs, limit), scores)
    assert sum(r * width for r, width in zip(kept, widths, strict=True)) <= limit
    assert all(r <= sum(score > 0 for score in own) for r, own in zip(kept, scores, strict=True))
    if limit >= sum(costs):
        assert kept == [sum(score > 0 for score in own) for own in scores]


def test_equal_scores_of_one_rank_each_are_lora_of_rank_one():
    scores = [[1.0, *[0.01] * 7]] * 5
    assert chosen_ranks(Budget((80,) * 5, 50), scores) == [1] * 5
    assert chosen_ranks(Budget.of_count(2, n=5), [[1.0] * 8] * 5) == [8, 8, 0, 0, 0]  # two adapters' worth of ranks


def test_a_wide_site_pays_for_its_width():
    assert chosen_ranks(Budget((20, 2), 12), [[3.0, 3.0], [1.0, 1.0]]) == [1, 2]  # 0.3 a parameter against 1


def test_budgets_of_whole_adapters_are_refused():
    for budget in (Spread(Budget((1,), 1), ("",)), CostBudget((additive_cost([1]),), (1,))):
        with pytest.raises(OptionError, match="give per='site'"):
            chosen_ranks(budget, [[1.0]])


def test_alpha_follows_the_rank_so_that_the_scaling_stays():
    sites = [Site("a", 8, 8), Site("b", 8, 8), Site("c", 8, 8)]
    plan = make_plan(sites, LoraConfig(r=8, lora_alpha=16), ["a", "b"], ranks={"a": 8, "b": 3})
    assert [(entry.r, entry.alpha) for entry in plan.entries] == [(8, 16), (3, 6), (0, 16)]
    config = plan.to_lora_config()
    assert {config.lora_alpha / config.r, 6 / 3} == {2.0}
    rslora = make_plan(sites, LoraConfig(r=8, lora_alpha=16, use_rslora=True), ["a", "b"], ranks={"a": 8, "b": 3})
    assert [entry.alpha for entry in rslora.entries] == [16, 16, 16]
    # WeightLoRA+ grows all ranks by one factor, 3 · 8 ranks of plain LoRA ÷ 11, rounded down.
    assert plan.expand().ranks == {"a": 17, "b": 6, "c": 0}
