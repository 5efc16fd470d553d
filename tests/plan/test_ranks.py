"""A budget spent rank by rank, how sites compete for it, and the alpha of a lower rank."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig

from weightlora.cost.knapsack import CostBudget, additive_cost
from weightlora.errors import OptionError
from weightlora.model.sites import Site
from weightlora.plan.budget import Budget, Spread, chosen_ranks, ranked
from weightlora.plan.limits import Limits
from weightlora.plan.plan import make_plan
from weightlora.selection.allocate import Costs, allocate

# -- rank by rank: closed forms, and properties of every budget and score --------------------------------------------


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


# -- how sites compete for a budget: closed forms, and properties of every budget and score --------------------------

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


# -- alpha/r stays, and equal alphas stay equal ----------------------------------------------------------------------

SQUARE = [Site(f"layer.{i}.{kind}", 16, 16) for i in range(4) for kind in "kqv"]
NAMES = [site.name for site in SQUARE]


def plan_of(lora, ranks, alpha_by="least"):
    return make_plan(SQUARE, lora, NAMES, ranks=dict(zip(NAMES, ranks, strict=True)), alpha_by=alpha_by)


@pytest.mark.parametrize("r", [1, 2, 4, 7, 8, 16])
def test_equal_ranks_keep_loras_scaling(r):
    plan = plan_of(LoraConfig(r=8, lora_alpha=16), [r] * 12)
    assert {entry.alpha for entry in plan.entries} == {2 * r}
    assert plan.to_lora_config().alpha_pattern == {}


def test_single_sites_of_one_rank_more_have_the_same_alpha():
    """llama.cpp reads one alpha for all tensors."""
    lora = LoraConfig(r=8, lora_alpha=16)
    ranks = allocate(SQUARE, None, Costs.of(SQUARE, lora), Limits(parameters=0.2))
    assert sorted({*ranks}) == [1, 2]
    assert plan_of(lora, ranks).to_lora_config().alpha_pattern == {}
    assert plan_of(lora, ranks).to_lora_config().lora_alpha == 2


def test_the_ratio_of_each_site_stays_where_it_is_asked_for_and_rslora_keeps_alpha():
    ratio = plan_of(LoraConfig(r=8, lora_alpha=16), [2, 3] * 6, alpha_by="ratio")
    assert {(entry.r, entry.alpha) for entry in ratio.entries} == {(2, 4), (3, 6)}
    rslora = plan_of(LoraConfig(r=8, lora_alpha=16, use_rslora=True), [2] * 12)
    assert {entry.alpha for entry in rslora.entries} == {16}


def test_a_small_or_broken_alpha_stays_positive():
    assert {entry.alpha for entry in plan_of(LoraConfig(r=64, lora_alpha=1), [1] * 12).entries} == {1 / 64}
    half = plan_of(LoraConfig(r=4, lora_alpha=2.5), [1] * 12)  # PEFT takes floats as well
    assert {entry.alpha for entry in half.entries} == {0.625}


def test_alpha_patterns_of_the_user_scale_alike():
    lora = LoraConfig(r=8, lora_alpha=16, alpha_pattern={"k": 32}, rank_pattern={"k": 16})
    ranks = [4 if name.endswith("k") else 2 for name in NAMES]  # a quarter of each
    assert {entry.site.projection: entry.alpha for entry in plan_of(lora, ranks).entries} == {"k": 8, "q": 4, "v": 4}
