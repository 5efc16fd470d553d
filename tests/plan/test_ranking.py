"""How sites compete for a budget: closed forms, and properties of every budget and score."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightlora.cost.knapsack import CostBudget, additive_cost
from weightlora.errors import OptionError
from weightlora.model.sites import Site
from weightlora.plan.budget import Budget
from weightlora.plan.ranking import Spread, ranked

SITES = [Site(f"layer.{i}.{kind}", 4, 4) for i in range(3) for kind in ("up", "down")]


@st.composite
def candidates(draw):
    """Costs, groups (projections or blocks) and sizes of one to eight sites."""
    n = draw(st.integers(1, 8))
    costs, groups, sizes = (
        draw(st.lists(each, min_size=n, max_size=n))
        for each in (st.integers(1, 6), st.sampled_from("abc"), st.floats(-2, 2))
    )
    return tuple(costs), tuple(groups), sizes


@pytest.mark.parametrize(
    ("k", "kept"),
    [
        (1, [4]),  # one part: the best of all
        (2, [1, 4]),  # blocks 0 and 1, blocks 2 and 3
        (4, [1, 2, 4, 7]),  # each block its best
        (5, [1, 2, 4, 5, 7]),  # and the best of the others, as all have spent the same
    ],
)
def test_sites_are_spread_over_the_blocks(k, kept):
    sizes = [0.1, 2.0, 1.0, 0.9, 9.0, 8.0, 6.0, 7.0]
    sites = [Site(f"layer.{i // 2}.{'up' if i % 2 else 'down'}", 4, 4) for i in range(8)]
    budget = Budget.of_count(k, n=8)
    spread = ranked(budget, "spread", sites)
    assert spread.choose(sizes) == kept
    if k <= 4:  # negative control: without it the last two blocks take all
        assert budget.choose(sizes) == [4, 5, 6, 7][:k]


def test_the_depth_is_the_number_of_the_block_and_not_its_name():
    """Sorted by name, the lower half of twelve blocks would be 0, 1, 10, 11, 2 and 3."""
    sites = sorted(Site(f"layers.{k}.up", 4, 4) for k in range(12))
    spread = ranked(Budget.of_count(2, n=12), "spread", sites)
    sizes = {"layers.11.up": 9.0, "layers.6.up": 8.0, "layers.5.up": 7.0}
    kept = spread.choose([sizes.get(site.name, 0.1) for site in sites])
    assert {sites[i].name for i in kept} == {"layers.11.up", "layers.5.up"}


def test_a_part_that_has_spent_less_is_next_whatever_the_score():
    sizes = [1.0, 0.5, 0.4, 9.0, 8.0, 7.0]
    budget = Budget.of_count(4, n=6)
    assert Spread(budget, ("a",) * 3 + ("b",) * 3).choose(sizes) == [0, 1, 3, 4]
    assert budget.choose(sizes) == [0, 3, 4, 5]  # negative control


def test_a_share_is_that_of_the_parameters_of_a_part():
    """Block b has three sites of 2 for each of block a's: at half of 16 parameters a keeps one of 2, b three."""
    spread = Spread(Budget((2,) * 8, limit=8), ("a",) * 2 + ("b",) * 6)
    assert spread.choose([9.0, 8.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]) == [0, 2, 3, 4]


@given(st.data(), st.integers(1, 5), st.integers(1, 5))
def test_blocks_of_equal_sites_keep_as_many_give_or_take_one(data, blocks, each):
    n = blocks * each
    count = data.draw(st.integers(blocks, n))
    sizes = data.draw(st.lists(st.floats(0.1, 9), min_size=n, max_size=n))
    block = tuple(f"{i // each}" for i in range(n))
    kept = Spread(Budget.of_count(count, n=n), block).choose(sizes)
    assert len(kept) == count
    for name in {*block}:
        own = [i for i in range(n) if block[i] == name]
        here = sorted({*kept} & {*own})
        assert len(here) in (count // blocks, -(-count // blocks))
        assert sorted(sizes[i] for i in here) == sorted(sizes[i] for i in own)[each - len(here) :]  # its best


def test_a_part_without_a_positive_size_has_no_turn():
    assert Spread(Budget.of_count(2, n=3), ("a", "b", "b")).choose([-1.0, 3.0, 2.0]) == [1, 2]


@given(candidates(), st.integers(1, 30))
def test_spread_sites_fit_the_budget_and_no_part_is_left_out(sites, limit):
    """With room for the best site of each block, each block with a positive size has one."""
    costs, blocks, sizes = sites
    kept = Spread(Budget(costs, limit), blocks).choose(sizes)
    assert sum(costs[i] for i in kept) <= limit
    assert kept == sorted(set(kept))
    best = [
        max((i for i in range(len(sizes)) if blocks[i] == b), key=lambda i: sizes[i]) for b in dict.fromkeys(blocks)
    ]
    best = [i for i in best if sizes[i] > 0]
    if sum(costs[i] for i in best) <= limit:
        assert {*best} <= {*kept}


def test_a_ranking_that_does_not_fit_is_one_line():
    budget = Budget.of_count(2, n=6)
    with pytest.raises(OptionError, match="ranking='best' is not allowed: give one of score, spread"):
        ranked(budget, "best", SITES)
    measured = CostBudget((additive_cost([1] * 6),), (3,))
    assert ranked(measured, "score", SITES) is measured
    with pytest.raises(OptionError, match="ranking='spread' does not go with limits on time or memory"):
        ranked(measured, "spread", SITES)
