"""The curves' numbers; pixels are only looked at."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from weightlora.errors import PlanError
from weightlora.model.sites import Site
from weightlora.plan.plan import AdapterPlan, PlannedSite
from weightlora.report.knee import ORDERS, draw_knee, has_gain, knee_text, make_knee

#: Four standard deviations of the mean of ORDERS values between 0 and 1.
FOUR_SIGMA = 4 * 0.5 / ORDERS**0.5


def plan_of(*rows, rule="first_order"):
    """A plan of (name, size, score, kept): an adapter at rank 1 has ``size`` parameters."""
    entries = (
        PlannedSite(Site(name, size - 1, 1), 1, 2, r=int(kept), alpha=2, score=score)
        for name, size, score, kept in rows
    )
    return AdapterPlan(tuple(sorted(entries, key=lambda entry: entry.site.name)), rule=rule)


def stack(scores, sizes=None, kept=()):
    """One site for each block."""
    sizes = sizes or [10] * len(scores)
    rows = enumerate(zip(sizes, scores, strict=True))
    return plan_of(*((f"layers.{i}.q", size, score, i in kept) for i, (size, score) in rows))


@st.composite
def stacks(draw):
    count = draw(st.integers(1, 12))
    scores = draw(st.lists(st.floats(-5, 5, allow_subnormal=False), min_size=count, max_size=count))
    scores[0] = draw(st.floats(0.1, 5))
    sizes = draw(st.lists(st.integers(2, 50), min_size=count, max_size=count))
    return stack(scores, sizes, kept=draw(st.sets(st.integers(0, count - 1))))


# -- the curve over the parameters -----------------------------------------------------------------------------------


def test_equal_scores_per_parameter_are_the_diagonal_in_any_order():
    sizes = [30, 10, 20, 40]
    knee = make_knee(stack([float(size) for size in sizes], sizes))
    assert knee.gain == pytest.approx(knee.cost)
    for x, spread in zip(knee.at, knee.chance, strict=True):
        assert (spread.mean, spread.low, spread.high) == pytest.approx((x, x, x))


def test_one_site_has_all_of_the_gain():
    knee = make_knee(stack([0.0, 3.0, 0.0, 0.0, 0.0]))
    assert knee.gain == (0, 1, 1, 1, 1, 1)
    assert (knee.order[0], knee.marked, knee.marked_point) == ("layers.1.q", 1, (0.2, 1.0))
    # A random order holds it at the k-th of five places: this costs k/5, whose mean is 3/5.
    assert knee.marked_by_chance.mean == pytest.approx(0.6, abs=FOUR_SIGMA)
    assert (knee.marked_by_chance.low, knee.marked_by_chance.high) == pytest.approx((0.2, 1.0))


def test_two_sites_one_with_all_of_the_gain():
    """Half of the orders rise from 0 to 1 over the first half of the parameters, the others over the second."""
    panel = make_knee(stack([1.0, 0.0]))
    spread = dict(zip(panel.at, panel.chance, strict=True))
    assert (spread[0.25].low, spread[0.25].high, spread[0.75].low, spread[0.75].high) == (0.0, 0.5, 0.5, 1.0)
    assert spread[0.25].mean == pytest.approx(0.25, abs=FOUR_SIGMA)
    assert spread[0.75].mean == pytest.approx(spread[0.25].mean + 0.5)


def test_whole_sites_are_counted_for_random_orders_too():
    knee = make_knee(stack([1.0] * 5))  # three sites have 60 %, four have 80 %
    assert (knee.marked, knee.marked_point) == (4, pytest.approx((4 / 5, 4 / 5)))
    assert (knee.marked_by_chance.low, knee.marked_by_chance.high) == pytest.approx((4 / 5, 4 / 5))


@settings(deadline=None)  # other processes may have the processor
@given(stacks())
def test_the_curve_rises_from_0_to_1_and_never_gets_steeper(plan):
    panel = make_knee(plan)
    points = list(zip(panel.cost, panel.gain, strict=True))
    assert (points[0], points[-1]) == ((0.0, 0.0), (1.0, 1.0))
    slopes = [(after[1] - before[1]) / (after[0] - before[0]) for before, after in pairwise(points)]
    assert min(slopes) >= 0
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(slopes))


@pytest.mark.slow
@settings(deadline=None)  # other processes may have the processor
@given(stacks())
@example(stack([3.0, 1.0, 0.0]))  # (1 − ¼)·(1 − ⅔) ÷ (1 − ⅔) is not 1 − ¼ in floats
def test_the_random_orders_rise_from_0_to_1_under_the_curve(plan):
    knee = make_knee(plan)
    chance = knee.chance
    assert (chance[0].high, chance[-1].low) == (0.0, 1.0)
    for x, spread in zip(knee.at, chance, strict=True):
        costs = knee.cost
        i = max(k for k in range(len(costs) - 1) if costs[k] <= x)
        share = (x - costs[i]) / (costs[i + 1] - costs[i])
        best = knee.gain[i] + share * (knee.gain[i + 1] - knee.gain[i])
        assert spread.low <= spread.high <= best + 1e-9
        assert spread.mean <= best + 1e-9


@pytest.mark.slow
@settings(deadline=None)  # other processes may have the processor
@given(stacks())
def test_negative_scores_add_nothing(plan):
    clipped = stack([max(e.score, 0.0) for e in by_block(plan)], [e.site.parameters(1) for e in by_block(plan)])
    mine, other = make_knee(plan), make_knee(clipped)
    assert mine.gain == other.gain
    assert mine.chance == other.chance


def by_block(plan):
    return sorted(plan.entries, key=lambda entry: int(entry.site.name.split(".")[1]))


@settings(deadline=None)  # other processes may have the processor
@given(stacks())
def test_the_mark_is_the_fewest_of_the_best_sites_with_three_quarters_of_the_gain(plan):
    knee = make_knee(plan)
    sizes = {entry.site.name: entry.site.parameters(entry.lora_r) for entry in plan.entries}
    gains = {entry.site.name: max(entry.score, 0.0) for entry in plan.entries}
    chosen = knee.order[: knee.marked]
    wanted = 0.75 * sum(gains.values())
    assert sum(gains[name] for name in chosen) >= wanted * (1 - 1e-9)
    assert sum(gains[name] for name in chosen[:-1]) < wanted
    cost = sum(sizes[name] for name in chosen) / sum(sizes.values())
    assert knee.marked_point == (pytest.approx(cost), knee.gain[knee.marked])


@settings(deadline=None)  # other processes may have the processor
@given(stacks())
def test_the_kept_set_is_added_up_as_it_is(plan):
    kept = [entry for entry in plan.entries if entry.r > 0]
    whole = sum(max(entry.score, 0) for entry in plan.entries)
    size = sum(entry.site.parameters(1) for entry in plan.entries)
    cost, gain = make_knee(plan).kept
    assert cost == pytest.approx(sum(entry.site.parameters(1) for entry in kept) / size)
    assert gain == pytest.approx(sum(max(entry.score, 0) for entry in kept) / whole)


def test_an_expanded_plan_has_the_curve_of_the_plan_it_came_from():
    plan = stack([4.0, 1.0, 2.0, 3.0], kept=(0, 3))
    assert plan.expand().parameters > plan.parameters
    assert make_knee(plan.expand()) == make_knee(plan)


def test_noise_lifts_the_curve_over_the_random_orders_too():
    """What the caption warns of: these scores know nothing of their sites."""
    noise = random.Random(1)
    panel = make_knee(stack([abs(noise.gauss(0, 1)) for _ in range(40)]))
    assert panel.gain[20] > dict(zip(panel.at, panel.chance, strict=True))[0.5].high


def test_the_seed_decides_the_random_orders_and_nothing_else():
    plan = stack([4.0, 1.0, 2.0, 3.0])
    state = random.getstate()
    first, again, other = make_knee(plan), make_knee(plan), make_knee(plan, seed=1)
    assert random.getstate() == state
    assert first == again
    assert first.chance != other.chance
    assert first.gain == other.gain


# -- what is told and drawn ------------------------------------------------------------------------------------------


def test_the_line_names_sites_parameters_and_random_orders():
    knee = make_knee(stack([1.0, 1.0, 1.0, 9.0], sizes=[10, 10, 10, 20]))
    spread = knee.marked_by_chance
    assert knee_text(knee) == (
        "75 % of the gain is in 1 of 4 sites with 40 % of the parameters; "
        f"random sites need {100 * spread.mean:.0f} % of the parameters for as much (8 of 10 orders: 40 % to 100 %)"
    )


@pytest.mark.parametrize(
    ("scores", "has"),
    [((1.0, 2.0), True), ((1.0, 1.0), False), ((1.0, 0.0), False), ((1.0, -2.0), False), ((0.0, 0.0), False)],
)
def test_a_plan_has_gain_where_positive_scores_differ(scores, has):
    assert has_gain(stack(scores)) is has


def test_random_numbers_are_no_gain():
    """A training that is too short for scoring draws its sites, which the plan records as scores."""
    assert not has_gain(replace(stack([1.0, 2.0]), rule="stratified"))


def test_a_plan_without_a_positive_score_is_refused():
    plan = plan_of(("a.0.q", 10, 0.0, True), ("a.1.q", 10, -1.0, False), rule="random")
    with pytest.raises(PlanError, match=r"no site of this plan has a positive score \(rule 'random'\)"):
        make_knee(plan)


def opened(path):
    """Width and height, of a PNG that decodes to its end."""
    from matplotlib.image import imread

    height, width, _ = imread(path).shape
    return width, height


def test_the_png_is_whole(tmp_path):
    draw_knee(make_knee(stack([3.0, 1.0, 2.0], kept=(0,))), tmp_path / "one.png")
    draw_knee(make_knee(plan_of(("up", 10, 1.0, False), ("down", 10, 2.0, False))), tmp_path / "none.png")
    assert opened(tmp_path / "one.png") == opened(tmp_path / "none.png") > (800, 600)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["none.png", "one.png"]
