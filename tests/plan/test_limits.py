"""What a user may ask for: each limit in its range, what it comes to, and one line for everything else."""

import math
import warnings
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightlora.errors import OptionError, WeightLoraWarning
from weightlora.plan.budget import Budget, expanded_ranks
from weightlora.plan.limits import LIMITS, Limits, check_limit, read_limit, read_limits

SIZES = st.lists(st.integers(-3, 3), min_size=1, max_size=8)  # a narrow range: ties are common
NAN, INF = float("nan"), float("inf")

#: Values that a limit cannot have.
WRONG = {
    "adapters": [0, -1, -0.5, 0.0, 1.5, NAN, INF, True, "18", "", [], {}],
    "parameters": [0, -1, 0.0, 1.5, NAN, INF, True, "300k", "", [], {}],
    "time": [0, -1, 0.0, 1.5, 2, NAN, INF, True, "0.6", "0.8x", [], {}],
    "memory": [0, 8, 8e9, True, "", "8", "GB", "0MB", "-3MB", "1.2.3GB", "nanGB", "8 apples", [], {}],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_what_is_out_of_range_is_one_line_with_the_value(name, value):
    with pytest.raises(OptionError) as caught:
        Limits(**{name: value})
    assert f"{name}={value!r}" in str(caught.value)
    assert "give " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_ends_of_the_range_are_allowed():
    for name, values in {
        "adapters": [1, 10**9, 1e-9, 1.0],
        "parameters": [1, 10**12, 1e-9, 1.0],
        "time": [1e-9, 1, 1.0],
        "memory": ["1kB", ".5 GiB", "1_000mb", "8GB"],
    }.items():
        for value in values:
            assert Limits(**{name: value}).asked == {name: value}


def test_numbers_of_numpy_are_pythons():
    limits = Limits(adapters=np.int64(2), parameters=np.float32(0.5), time=Fraction(1, 2))
    assert limits == Limits(adapters=2, parameters=0.5, time=0.5)
    assert [type(value) for value in limits.asked.values()] == [int, float, float]
    assert limits.k_of(10) == 2
    assert type(check_limit("time", 1)) is float


def test_without_a_limit_half_of_the_adapters_are_kept():
    assert Limits().asked == {}
    assert Limits().limits == Limits(adapters=0.5)
    assert Limits(time=0.5).limits == Limits(time=0.5)
    assert [Limits().k_of(n) for n in (2, 3, 36)] == [1, 1, 18]


@pytest.mark.parametrize("name", LIMITS)
def test_only_parameters_alone_free_the_ranks(name):
    values = {"adapters": 2, "parameters": 0.5, "time": 0.5, "memory": "1GB"}
    assert Limits(**{name: values[name]}).frees_ranks == (name == "parameters")
    assert not Limits(**{**values, name: None}).frees_ranks
    assert Limits(**{name: values[name]}).are_measured == (name in ("time", "memory"))


@given(st.integers(1, 200), st.integers(1, 100))
def test_a_share_of_adapters_is_rounded_down_in_decimals(n, percent):
    if percent * n < 100:
        with pytest.raises(OptionError, match=rf"of {n} candidate sites is less than one adapter; raise it"):
            Limits(adapters=percent / 100).k_of(n)
    else:
        assert Limits(adapters=percent / 100).k_of(n) == percent * n // 100


def test_more_adapters_than_there_are():
    assert Limits(adapters=3).k_of(3) == 3
    with pytest.raises(OptionError, match="adapters=4 exceeds the 3 candidate sites; lower it or widen target_modules"):
        Limits(adapters=4).k_of(3)


@pytest.mark.parametrize(
    ("share", "total", "limit"),
    [
        (0.5, 61, 30),  # rounded down
        (0.1, 30, 3),  # the float is a little more than 1/10
        (0.7, 10, 7),  # and this one a little less than 7/10
        (1.0, 40, 40),
        (1e-05, 100_000, 1),
    ],
)
def test_a_share_is_that_of_the_decimal_that_was_written(share, total, limit):
    assert Limits(parameters=share).parameters_of(total) == limit
    assert Limits(time=share).time_of(total) == limit


def test_a_hundredth_is_a_hundredth():
    assert [Limits(parameters=k / 100).parameters_of(100) for k in range(1, 101)] == [*range(1, 101)]


def test_a_number_of_parameters_is_for_all_adapters_together():
    assert Limits(parameters=100).parameters_of(1000, besides=30) == 70
    assert Limits(parameters=0.1).parameters_of(1000, besides=30) == 100  # a share is that of the chosen ones
    with pytest.raises(OptionError, match="parameters=30 leaves nothing beside 30 parameters of target_parameters"):
        Limits(parameters=30).parameters_of(1000, besides=30)


@pytest.mark.parametrize(
    ("text", "limit"),
    [("8GB", 8 * 10**9), ("7.5 GiB", 15 * 2**29), (".5kb", 500), ("1_000 MB", 10**9), ("2MiB", 2**21)],
)
def test_bytes_are_read_exactly(text, limit):
    assert Limits(memory=text).bytes == limit


def test_a_decimal_number_of_bytes_is_read_exactly():
    assert [Limits(memory=f"{m / 1000}kB").bytes for m in range(1, 5000)] == [*range(1, 5000)]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("adapters", "18", 18),
        ("adapters", "0.5", 0.5),
        ("adapters", "1", 1),
        ("adapters", "1.0", 1.0),  # 1 is one adapter, 1.0 are all of them
        ("parameters", "300_000", 300_000),
        ("time", "1", 1.0),
        ("memory", " 8GB ", "8GB"),
    ],
)
def test_a_command_line_gives_a_limit_its_type(name, text, value):
    found = read_limit(name, text)
    assert found == value
    assert type(found) is type(value)
    assert read_limits({**dict.fromkeys(LIMITS), name: text, "seed": "1"}) == {name: value}


@pytest.mark.parametrize(("name", "text"), [("adapters", "half"), ("parameters", "300k"), ("time", "0.8x")])
def test_what_is_no_limit_is_refused_as_text(name, text):
    with pytest.raises(OptionError, match=rf"^{name}='{text}' is not allowed: give a "):
        read_limit(name, text)


@pytest.mark.parametrize("name", ["adapters", "parameters"])
def test_one_as_a_share_says_once_that_nothing_is_selected(name):
    with pytest.warns(WeightLoraWarning, match=rf"^{name}=1.0 is all of them.*{name}=1 is one {name[:-1]}") as caught:
        Limits(**{name: 1.0}).warn_of_all(stacklevel=2)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in ({name: 1}, {name: 0.999}, {name: 1.0, "time": 0.5}, {"time": 1.0}, {}):
            Limits(**other).warn_of_all(stacklevel=2)


# -- the best of what a number pays for --------------------------------------------------------------------------------


@st.composite
def plans(draw, *, equal=False):
    """Ranks, kept flags (at least one) and sizes of some sites; with ``equal`` all of one rank and shape."""
    n = draw(st.integers(1, 12))
    rank, size = st.integers(1, 64), st.integers(2, 5000)
    ranks = [draw(rank)] * n if equal else draw(st.lists(rank, min_size=n, max_size=n))
    sizes = [draw(size)] * n if equal else draw(st.lists(size, min_size=n, max_size=n))
    kept = draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any))
    return ranks, kept, sizes


def planned(ranks, kept):
    return [r if stays else 0 for r, stays in zip(ranks, kept, strict=True)]


def test_half_of_the_parameters_is_not_half_of_the_sites():
    """Negative control: by size, the top two of four would be two thirds of the parameters."""
    half = Limits(parameters=0.5).parameters_of(60)
    assert Budget((10, 10, 20, 20), half).choose([1, 2, 3, 4]) == [1, 3]
    assert Budget.of_count(2, n=4).choose([1, 2, 3, 4]) == [2, 3]


@given(st.floats(0, 1, exclude_min=True), st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.data())
def test_a_share_is_never_exceeded_and_all_are_kept_at_one(share, costs, data):
    scores = data.draw(st.lists(st.floats(-9, 9), min_size=len(costs), max_size=len(costs)))
    kept = Budget(tuple(costs), Limits(parameters=share).parameters_of(sum(costs))).choose(scores)
    assert sum(costs[i] for i in kept) <= Fraction(str(share)) * sum(costs)
    assert bool(kept) == (math.floor(Fraction(str(share)) * sum(costs)) >= min(costs))
    assert Budget(tuple(costs), sum(costs)).choose(scores) == list(range(len(costs)))


@given(SIZES, st.data())
def test_with_unit_costs_choose_is_the_best_k_and_ties_go_to_the_first(sizes, data):
    k = data.draw(st.integers(1, len(sizes)))
    # combinations() comes in lexical order and max() takes the first of equals
    best = max(combinations(range(len(sizes)), k), key=lambda kept: sum(sizes[i] for i in kept))
    assert Budget.of_count(k, n=len(sizes)).choose(sizes) == list(best)


@given(SIZES, st.data())
def test_choose_never_exceeds_the_limit_and_passes_over_only_what_does_not_fit(sizes, data):
    n = len(sizes)
    costs = data.draw(st.lists(st.integers(1, 20), min_size=n, max_size=n))
    limit = data.draw(st.integers(0, sum(costs)))
    chosen = Budget(tuple(costs), limit).choose(sizes)
    left = limit - sum(costs[i] for i in chosen)
    assert left >= 0
    assert chosen == sorted(set(chosen))
    for i in set(range(n)) - set(chosen):
        # What was taken before i left too little for it.
        before = [j for j in chosen if (-sizes[j], j) < (-sizes[i], i)]
        assert sum(costs[j] for j in before) + costs[i] > limit


@given(plans(), st.integers(1, 8))
def test_expanded_ranks_stay_within_both_budgets_and_never_shrink(plan, step):
    ranks, kept, sizes = plan
    new = expanded_ranks(ranks, planned(ranks, kept), sizes, step=step)
    assert sum(new) <= sum(ranks)
    assert sum(r * size for r, size in zip(new, sizes, strict=True)) <= sum(
        r * size for r, size in zip(ranks, sizes, strict=True)
    )
    for r, old, stays in zip(new, ranks, kept, strict=True):
        assert r >= old if stays else r == 0
        assert r % step == 0 or r in (0, old)


@given(plans(equal=True))
def test_with_equal_shapes_the_new_rank_is_r_times_n_over_k(plan):
    ranks, kept, sizes = plan
    assert expanded_ranks(ranks, planned(ranks, kept), sizes) == [
        ranks[0] * len(ranks) // sum(kept) * stays for stays in kept
    ]


@given(st.integers(1, 64), st.integers(1, 10))
def test_half_of_the_sites_get_twice_the_rank(r, half):
    assert expanded_ranks([r] * 2 * half, [r, 0] * half) == [2 * r, 0] * half


@given(st.integers(1, 64), st.data())
def test_with_equal_ranks_no_larger_rank_would_fit(r, data):
    _, kept, sizes = data.draw(plans())
    new = max(expanded_ranks([r] * len(kept), planned([r] * len(kept), kept), sizes)) + 1
    kept_sizes = sum(size for size, stays in zip(sizes, kept, strict=True) if stays)
    assert new * sum(kept) > r * len(kept) or new * kept_sizes > r * sum(sizes)
