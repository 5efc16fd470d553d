"""The solver: all limits hold, more of a limit is no worse, and no set of sites would be better."""

import random
import time
from dataclasses import replace
from itertools import accumulate, pairwise
from math import floor, fsum

import numpy as np
import pytest
from fuzz import random_cost
from peft import LoraConfig

from weightlora.cost.knapsack import ANY, Cost, Item, make_cost
from weightlora.errors import OptionError
from weightlora.model.sites import Site
from weightlora.plan.limits import Limits
from weightlora.selection.allocate import Costs, allocate, chooser_of, rank_budget, site_budget, spread_order

#: 10,000 cases of each property in all, in parts of which the short tier runs a few.
PARTS, CASES = 50, 200
in_parts = pytest.mark.parametrize("part", range(PARTS))


def seeds(part):
    return range(part * CASES, (part + 1) * CASES)


def random_sites(draw, n):
    """Sites of any width in any block, under plain LoRA or with ranks of their own, with or without a vector."""
    sites = [Site(f"layers.{i // 3}.{'qkv'[i % 3]}", draw.randint(1, 9), draw.randint(1, 9)) for i in range(n)]
    ranks = [draw.randint(1, 8) for _ in sites] if draw.random() < 0.5 else [draw.randint(1, 8)] * n
    vectors = draw.randint(0, 1)
    fixed = tuple(site.out_features for site in sites) if vectors else ()
    return sites, Costs(tuple(ranks), tuple(site.in_features + site.out_features for site in sites), fixed)


def case(seed, *, most=10, **given):
    """Sites, scores of which some are not positive, costs and limits, of which ``given`` are as they are said to be."""
    draw = random.Random(seed)
    n = draw.randint(1, most)
    sites, costs = random_sites(draw, n)
    scores = [draw.choice([draw.random() ** 2, draw.random(), 0.0, -draw.random()]) for _ in sites]
    scores[draw.randrange(n)] = 1.0
    costs = replace(costs, time=random_cost(draw, n), memory=random_cost(draw, n))
    asked = {
        "adapters": draw.choice([draw.randint(1, n), draw.uniform(1 / n, 1)]),
        "parameters": draw.choice([draw.randint(1, 1 + 2 * sum(costs.adapters)), draw.uniform(0.01, 1)]),
        "time": draw.uniform(0.1, 1),
        "memory": f"{draw.randint(1, 2 * costs.memory.of_all + 1) / 1000}kB",
    }
    kept = [name for name in asked if draw.random() < 0.5] or [draw.choice([*asked])]
    asked = {name: asked[name] for name in kept} | given
    return sites, scores, costs, Limits(**{name: value for name, value in asked.items() if value is not False})


def parameters_of(sites, costs, ranks):
    """Counted anew: r rows of A and r columns of B, and one vector where there is one."""
    own = [r * (site.in_features + site.out_features) for site, r in zip(sites, ranks, strict=True)]
    return sum(own) + sum(site.out_features for site, r in zip(sites, ranks, strict=True) if r and costs.fixed)


def at_ranks(cost, costs, ranks, draw):
    """A cost whose items grow with the largest rank that causes them, each by a part of its own."""
    kept = sum(1 << i for i, r in enumerate(ranks) if r) | 1 << cost.n
    total = 0.0
    for item in cost.items:
        if item.is_caused_by(kept):
            own = [i for i, r in enumerate(ranks) if r and any(c[0] != ANY and c[0] >> i & 1 for c in item.causes)]
            more = max((ranks[i] / costs.ranks[i] for i in own), default=1.0)
            total += item.amount * (1 + draw.random() * max(more - 1, 0))
    return total


@pytest.mark.sampled(2)
@in_parts
def test_every_limit_holds(part):
    refused = 0
    for seed in seeds(part):
        sites, scores, costs, limits = case(seed)
        given = None if limits.frees_ranks and seed % 2 else scores
        try:
            ranks = allocate(sites, given, costs, limits)
        except OptionError:
            refused += 1
            continue
        kept = [i for i, r in enumerate(ranks) if r]
        assert given is None or all(scores[i] > 0 for i in kept)
        if isinstance(limits.adapters, int):
            assert len(kept) <= limits.adapters
        elif limits.adapters is not None:
            assert len(kept) <= limits.adapters * len(sites)
        if limits.parameters is None:
            assert all(ranks[i] == costs.ranks[i] for i in kept)
        else:
            most = limits.parameters
            whole = parameters_of(sites, costs, costs.ranks)
            assert parameters_of(sites, costs, ranks) <= (most if isinstance(most, int) else most * whole)
        if limits.frees_ranks:
            assert all(r <= own for r, own in zip(ranks, costs.ranks, strict=True))
        for cost, limit in ((costs.time, limits.time_of(costs.time.of_all)), (costs.memory, limits.bytes)):
            if limit is not None:
                assert cost.of(kept) <= limit
                assert at_ranks(cost, costs, ranks, random.Random(seed)) <= limit + 1e-6
    assert refused < 0.6 * CASES  # by far not all of it was refused


def of_every_set(cost):
    """A cost of all sets of sites, which are whole numbers."""
    sets = np.arange(1 << cost.n) | 1 << cost.n
    total = np.zeros(len(sets), dtype=np.int64)
    for item in cost.items:
        there = [((own & sets if own != ANY else sets) != 0) & ((below & sets) != 0) for own, below in item.causes]
        total += item.amount * np.logical_or.reduce(there)
    return total


def best_value(scores, costs, limits):
    """The largest total score of a set within the limits, of all 2ⁿ sets."""
    n = len(scores)
    members = (np.arange(1 << n)[:, None] >> np.arange(n)) & 1
    fits = np.ones(1 << n, dtype=bool)
    if limits.adapters is not None:
        k = limits.adapters if isinstance(limits.adapters, int) else floor(limits.adapters * n + 1e-9)
        fits &= members.sum(1) <= k
    for cost, limit in ((costs.time, limits.time_of(costs.time.of_all)), (costs.memory, limits.bytes)):
        fits &= True if limit is None else of_every_set(cost) <= limit
    return max((members @ np.maximum(scores, 0))[fits], default=0.0)


def value(sites, scores, costs, limits):
    """The total score of the sites that are kept; 0 where none fits."""
    try:
        ranks = allocate(sites, scores, costs, limits)
    except OptionError:
        return 0.0
    return fsum(score for score, r in zip(scores, ranks, strict=True) if r)


@pytest.mark.sampled(1)
@in_parts
def test_sites_are_the_best_of_all_sets_and_more_of_a_limit_is_no_worse(part):
    for seed in seeds(part):
        sites, scores, costs, limits = case(seed, parameters=False)
        if not limits.asked:
            continue
        found = value(sites, scores, costs, limits)
        assert found == pytest.approx(best_value(scores, costs, limits), abs=1e-5)
        draw = random.Random(seed)
        name = draw.choice([*limits.asked])
        more = {
            "adapters": len(sites) if limits.adapters is None else min(limits.k_of(len(sites)) + 1, len(sites)),
            "time": min(1.0, (limits.time or 0) * draw.uniform(1, 2)),
            "memory": f"{(limits.bytes or 1) * draw.randint(1, 3) / 1000}kB",
        }
        assert value(sites, scores, costs, replace(limits, **{name: more[name]})) >= found - 1e-5


@pytest.mark.sampled(2)
@in_parts
def test_more_parameters_are_no_lower_ranks(part):
    for seed in seeds(part):
        sites, _, costs, _ = case(seed)
        draw = random.Random(seed)
        whole = sum(costs.adapters)
        steps = sorted(draw.randint(min(costs.adapter(i, 1) for i in range(len(sites))), whole) for _ in range(4))
        found = [allocate(sites, None, costs, Limits(parameters=step)) for step in (*steps, whole)]
        spent = [parameters_of(sites, costs, ranks) for ranks in found]
        assert all(total <= step for total, step in zip(spent, (*steps, whole), strict=True))
        assert spent == sorted(spent)
        assert found[-1] == [*costs.ranks]
        for ranks, step in zip(found, (*steps, whole), strict=True):
            assert all(ranks) == (step >= sum(costs.adapter(i, 1) for i in range(len(sites))))  # rank 1 on all first
            assert all(ranks) or set(ranks) <= {0, 1}
        if len({*costs.ranks}) == 1:
            assert [min(ranks) for ranks in found] == sorted(min(ranks) for ranks in found)
            assert all(max(ranks) - min(ranks) <= 1 for ranks in found)
            assert all(max(ranks) <= 2 or max(ranks) == min(ranks) for ranks in found)  # rank 1 alone is raised by site
            for ranks, total, step in zip(found, spent, (*steps, whole), strict=True):  # none more could be raised
                low = [i for i, r in enumerate(ranks) if r == min(ranks) < min(2, costs.ranks[i])]
                assert all(costs.adapter(i, ranks[i] + 1) - costs.adapter(i, ranks[i]) > step - total for i in low)


# -- closed forms ------------------------------------------------------------------------------------------------------

FOUR = [Site(f"layer.{i}.q", 5, 5) for i in range(4)]
EQUAL = Costs(ranks=(8,) * 4, of_rank=(10,) * 4)


def test_parameters_alone_are_a_lower_rank_on_all_sites():
    """Of 320 parameters 250 are rank 6 on four sites; 50 are rank 1, and rank 2 on the first in the spread order."""
    assert allocate(FOUR, None, EQUAL, Limits(parameters=250)) == [6, 6, 6, 6]
    assert allocate(FOUR, None, EQUAL, Limits(parameters=50)) == [2, 1, 1, 1]
    assert allocate(FOUR, None, EQUAL, Limits(parameters=20)) == [1, 0, 1, 0]  # depth 0 and 1/2
    assert allocate(FOUR, None, EQUAL, Limits(parameters=10**9)) == [8, 8, 8, 8]  # never more than LoRA


def test_shares_of_ranks_of_their_own_and_none_below_one():
    """Half of 8 and of 1: the small rank stays."""
    costs = Costs(ranks=(8, 1, 8, 1), of_rank=(10,) * 4)
    assert allocate(FOUR, None, costs, Limits(parameters=100)) == [4, 1, 4, 1]
    assert allocate(FOUR, None, costs, Limits(parameters=40)) == [1, 1, 1, 1]


def test_scores_with_parameters_alone_keep_whole_adapters():
    assert allocate(FOUR, [1.0, 4.0, 3.0, 2.0], EQUAL, Limits(parameters=0.5)) == [0, 8, 8, 0]
    assert allocate(FOUR, [1.0, 4.0, 3.0, 2.0], EQUAL, Limits(parameters=0.5), ranking="spread") == [0, 8, 8, 0]
    with pytest.raises(OptionError, match=r"no site fits parameters=79 \(79 of plain LoRA's 320 .*leave rule out"):
        allocate(FOUR, [1.0] * 4, EQUAL, Limits(parameters=79))


def test_a_number_of_sites_with_parameters_has_the_ranks_that_they_pay_for():
    scores = [1.0, 4.0, 3.0, 2.0]
    assert allocate(FOUR, scores, EQUAL, Limits(adapters=2, parameters=50)) == [0, 2, 2, 0]
    assert allocate(FOUR, scores, EQUAL, Limits(adapters=2, parameters=30)) == [0, 2, 1, 0]
    assert allocate(FOUR, scores, EQUAL, Limits(adapters=2, parameters=10)) == [0, 1, 0, 0]
    assert allocate(FOUR, scores, EQUAL, Limits(adapters=2, parameters=1.0)) == [0, 16, 16, 0]
    assert allocate(FOUR, [-1.0, 0.0, 0.0, 0.0], EQUAL, Limits(adapters=2, parameters=1.0)) == [0] * 4


def test_a_rank_above_the_users_stays_within_the_time_if_all_of_an_adapter_grew_with_it():
    """Sites take 2 each of which 1 grows, so both may have 1 + (6 − 4)/2 = twice the rank."""
    items = [Item(1, ((1 << i, 1 << i),)) for i in range(4)] + [Item(1, ((ANY, 1 << i),)) for i in range(4)]
    costs = replace(EQUAL, time=make_cost(4, items, range(4)))
    assert costs.time.of_all == 8
    scores = [1.0, 4.0, 0.0, 0.0]
    assert allocate(FOUR, scores, costs, Limits(time=0.75, parameters=1.0)) == [16, 16, 0, 0]
    assert allocate(FOUR, scores, costs, Limits(time=0.5, parameters=1.0)) == [8, 8, 0, 0]
    assert allocate(FOUR, scores, costs, Limits(time=0.25, parameters=1.0)) == [0, 8, 0, 0]


def test_nothing_that_fits_is_one_line_that_names_the_limit():
    items = [Item(1000, ((ANY, 1 << 4),)), *(Item(10, ((1 << i, 1 << i),)) for i in range(4))]
    cost = make_cost(4, items, range(4))
    costs = replace(EQUAL, time=cost, memory=replace(cost))
    for limits, text in (
        (Limits(parameters=9), "no adapter fits parameters=9: rank 1 at one site takes 10 parameters, and 9 are left"),
        (Limits(adapters=1, parameters=9), "no adapter fits adapters=1, parameters=9: rank 1 .*; raise parameters"),
        (Limits(time=0.5), r"no site fits time=0.5: the cheapest, layer.0.q, takes 0.971 of LoRA's .*; raise time"),
        (Limits(time=1.0, memory="1kB"), r"no site fits time=1.0, memory='1kB': with one adapter, at layer.0.q, .*"),
    ):
        scores = None if limits.frees_ranks else [1.0] * 4
        with pytest.raises(OptionError, match=f"^{text}") as caught:
            allocate(FOUR, scores, costs, limits)
        assert "\n" not in str(caught.value)


def test_single_ranks_go_with_one_number_alone():
    ranks = [[3.0, 1.0], [2.0, 0.1], [0.0, 0.0], [-1.0, 0.5]]
    costs = replace(EQUAL, ranks=(2,) * 4)
    assert allocate(FOUR, ranks, costs, Limits(parameters=30)) == [2, 1, 0, 0]
    assert allocate(FOUR, ranks, costs, Limits(adapters=1)) == [1, 1, 0, 0]  # one adapter's worth of ranks
    for limits in (Limits(adapters=1, parameters=30), Limits(time=0.5), Limits(parameters=30, memory="1GB")):
        with pytest.raises(OptionError, match="within adapters or parameters alone, not within"):
            rank_budget(costs, limits)
    with pytest.raises(OptionError, match="rank 1 at one site takes 10 parameters, and 9 are left for it"):
        rank_budget(costs, Limits(parameters=9))


def test_a_method_of_whole_adapters_takes_one_number():
    lora = LoraConfig(r=8)
    with pytest.raises(OptionError, match=r"adapters=2, parameters=0\.5: this method keeps whole adapters; limit"):
        site_budget(FOUR, lora, Limits(adapters=2, parameters=0.5))
    assert site_budget(FOUR, lora, Limits()).choose([1.0, 2.0, 3.0, 4.0]) == [2, 3]


def test_measured_limits_have_no_ranking():
    costs = replace(EQUAL, time=make_cost(4, [Item(1, ((1 << i, 1 << i),)) for i in range(4)], range(4)))
    with pytest.raises(OptionError, match="ranking='spread' does not go with limits on time or memory"):
        chooser_of(FOUR, costs, Limits(time=0.5), "spread")


# -- the order where nothing is scored ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_any_first_sites_are_spread_over_the_projections(seed):
    """Of each projection the same share: cj − k·pj = ej·(1 − pj) − pj·Σ ei with rounding errors ej of at most 1/2."""
    draw = random.Random(seed)
    counts = {kind: draw.randint(1, 30) for kind in "abcdefg"[: draw.randint(2, 7)]}
    sites = [Site(f"layers.{i}.{kind}", 4, 4) for kind, count in counts.items() for i in range(count)]
    draw.shuffle(sites)
    order = spread_order(sites)
    assert sorted(order) == [*range(len(sites))]
    for kind, count in counts.items():
        share = count / len(sites)
        bound = 0.5 * (1 + share * (len(counts) - 2))
        taken = accumulate(sites[i].projection == kind for i in order)
        assert all(abs(c - k * share) <= bound + 1e-9 for k, c in enumerate(taken, start=1))


@pytest.mark.parametrize("blocks", [4, 6, 12, 32, 33])
def test_any_first_sites_are_spread_over_the_depth(blocks):
    """Sites of one projection leave gaps of at most twice an even stride, rounded up, at any beginning."""
    sites = [Site(f"layers.{i}.{kind}", 4, 4) for i in range(blocks) for kind in "qkv"]
    order = [sites[i] for i in spread_order(sites)]
    for kind in "qkv":
        own = [int(site.name.split(".")[1]) for site in order if site.projection == kind]
        for k in range(1, blocks + 1):
            places = sorted(own[:k])
            gaps = [b - a for a, b in pairwise([*places, places[0] + blocks])]  # from the last to the first as well
            assert max(gaps) <= 2 * -(-blocks // k)
    starts = {kind: next(site.block for site in order if site.projection == kind) for kind in "qkv"}
    assert len({*starts.values()}) == 3  # each projection begins at another depth


def test_layers_of_a_sequential_are_of_one_kind():
    sites = [Site(str(i), 4, 4) for i in range(8)]
    assert spread_order(sites)[:4] == [0, 4, 2, 6]


# -- how long it takes -------------------------------------------------------------------------------------------------


def large_cost(draw, blocks, each):
    """Blocks with q, k, v of one input, two of another, o and down of their own; seven items for each site or so."""
    n, items = blocks * each, []
    for block in range(blocks):
        first = block * each
        groups = [(0, 1, 2), (3,), (4, 5), (6,)]
        for group in groups:
            under = sum(1 << i for i in range(first + group[0]))
            places = [first + g for g in group]
            items.append(Item(draw.randint(1, 10**6), tuple((1 << i, 1 << i) for i in places)))
            for i in places:
                items.append(Item(draw.randint(1, 10**5), ((1 << i, 1 << i),)))
                items.append(Item(draw.randint(1, 10**5), ((1 << i, under),)))
                items.append(Item(draw.randint(1, 10**5), ((ANY, under | 1 << i),)))
                items.append(Item(draw.randint(1, 10**5), ((ANY, under), (1 << i, 1 << i))))
        passed = [sum(1 << i for i in range(first + g)) for g in range(15)]  # gradients of what is between the sites
        items += [Item(draw.randint(1, 10**5), ((ANY, below),)) for below in passed]
    return Cost(n, tuple(items), tuple(range(n)))


@pytest.mark.slow
def test_448_sites_with_3000_items_take_seconds(record_property):
    draw = random.Random(0)
    blocks, each = 64, 7
    sites = [Site(f"layers.{i}.{kind}", 4096, 4096) for i in range(blocks) for kind in "qkvogud"]
    cost = large_cost(draw, blocks, each)
    costs = Costs((8,) * len(sites), (8192,) * len(sites), time=cost, memory=cost)
    scores = [draw.random() ** 2 for _ in sites]
    for limits in (Limits(time=0.6), Limits(time=0.8, parameters=0.3), Limits(time=0.6, adapters=0.25)):
        start = time.perf_counter()
        ranks = allocate(sites, scores, costs, limits)
        seconds = time.perf_counter() - start
        record_property(limits.text, seconds)
        print(f"{len(cost.items)} items, {limits.text}: {sum(map(bool, ranks))} sites in {seconds:.2f} s")  # noqa: T201
        assert cost.of([i for i, r in enumerate(ranks) if r]) <= limits.time_of(cost.of_all)
