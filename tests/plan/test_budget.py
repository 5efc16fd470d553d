from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightlora.errors import OptionError, WeightLoraWarning
from weightlora.plan.budget import (
    Budget,
    GainShare,
    check_keep,
    expanded_ranks,
    read_budget,
    read_keep,
    read_share,
)

#: Parameters of four adapters, 60 together.
FOUR = {"a": 10, "b": 10, "c": 20, "d": 20}
SIZES = st.lists(st.integers(-3, 3), min_size=1, max_size=8)  # a narrow range: ties are common


def sized(parameters):
    return {f"site{i:04}": number for i, number in enumerate(parameters)}


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


@pytest.mark.parametrize(
    "keep",
    [
        0,
        -1,
        -0.5,
        0.0,
        float("nan"),
        float("inf"),
        1.5,
        True,
        5,
        "12 apples",
        "0 parameters",
        "3 parameters",
        "",
        "1.5",
        "0% gain",
        "101% gain",
        "60 gain",
        "autos",
    ],
)
def test_a_keep_out_of_range_is_one_line_with_the_value(keep):
    with pytest.raises(OptionError) as caught:
        read_budget(keep, FOUR)
    assert f"keep={keep!r}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [1, 4, 0.17, 1.0, "10 parameters", "0.5", "3"])
@pytest.mark.filterwarnings("ignore:keep=1.0")
def test_the_ends_of_the_range_are_allowed(keep):
    assert 1 <= len(read_budget(keep, FOUR).choose([4, 3, 2, 1])) <= 4


@pytest.mark.parametrize("keep", [1, 7, 10, "7"])
def test_a_whole_number_is_a_count(keep):
    assert read_budget(keep, sized([5] * 10)) == Budget(costs=(1,) * 10, limit=int(keep))


@pytest.mark.parametrize("keep", [1.0, "1.0"])
def test_one_as_a_fraction_says_that_nothing_is_selected(keep):
    with pytest.warns(WeightLoraWarning, match=r"nothing is selected; keep=1 is one adapter") as caught:
        assert read_budget(keep, sized([5, 5])).limit == 10
    assert len(caught) == 1
    assert read_budget(1, sized([5, 5])).limit == 1  # without a word
    assert read_budget("0.999", sized([5, 5])).limit == 9


@pytest.mark.parametrize(
    ("keep", "costs", "limit"),
    [
        (0.5, [10, 10, 20, 21], 30),  # rounded down
        (0.1, [10, 20], 3),  # the float is a little more than 1/10
        (0.7, [10], 7),  # and this one a little less than 7/10
        (1.0, [10, 10, 20], 40),
        ("0.5", [10, 10, 20], 20),
        ("1.0", [10, 10, 20], 40),
        (1e-05, [1] * 100_000, 1),
    ],
)
@pytest.mark.filterwarnings("ignore:keep=.*1.0")
def test_a_fraction_is_that_share_of_the_parameters(keep, costs, limit):
    if limit >= min(costs):
        assert read_budget(keep, sized(costs)) == Budget(costs=tuple(costs), limit=limit)
    else:
        with pytest.raises(OptionError, match=rf"{limit} of plain LoRA's {sum(costs)} parameters"):
            read_budget(keep, sized(costs))


@pytest.mark.filterwarnings("ignore:keep=1.0")
def test_a_hundredth_is_a_hundredth():
    read = [read_budget(k / 100, sized([1] * 100)).limit for k in range(1, 101)]
    assert read == list(range(1, 101))


def test_half_of_the_parameters_is_not_half_of_the_sites():
    """Negative control: by size, the top two of four would be two thirds of the parameters."""
    budget = read_budget(0.5, FOUR)
    assert budget.choose([1, 2, 3, 4]) == [1, 3]
    assert read_budget(2, FOUR).choose([1, 2, 3, 4]) == [2, 3]


@pytest.mark.filterwarnings("ignore:keep=1.0")
@given(st.floats(0, 1, exclude_min=True), st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.data())
def test_a_fraction_is_never_exceeded_and_all_are_kept_at_one(keep, costs, data):
    scores = data.draw(st.lists(st.floats(-9, 9), min_size=len(costs), max_size=len(costs)))
    if Fraction(str(keep)) * sum(costs) < min(costs):
        with pytest.raises(OptionError, match="raise keep or lower r"):
            read_budget(keep, sized(costs))
    else:
        kept = read_budget(keep, sized(costs)).choose(scores)
        assert 0 < sum(costs[i] for i in kept) <= Fraction(str(keep)) * sum(costs)
    assert read_budget(1.0, sized(costs)).choose(scores) == list(range(len(costs)))


@pytest.mark.parametrize("keep", [0.16, "0.16", "9 parameters"])
def test_a_budget_below_the_smallest_site_names_it_and_the_knobs(keep):
    with pytest.raises(OptionError, match=rf"no site fits keep={keep!r}.*at a, has 10; raise keep or lower r"):
        read_budget(keep, FOUR)


@pytest.mark.parametrize("keep", [0, -2, 2.5, "half", "2.5", "1.5x", "0MB"])
def test_what_no_model_allows_is_refused_without_a_model(keep):
    with pytest.raises(OptionError, match="keep="):
        check_keep(keep)


@pytest.mark.parametrize(
    ("keep", "limit"),
    [
        ("300k parameters", 300_000),
        ("300K params", 300_000),
        (" 1.5 M parameters ", 1_500_000),
        ("1_000 parameters", 1000),
        ("25 parameters", 25),
    ],
)
def test_a_parameter_budget_counts_parameters(keep, limit):
    assert read_budget(keep, sized([10, 20])) == Budget(costs=(10, 20), limit=limit)


def test_a_decimal_parameter_budget_is_read_exactly():
    assert [read_budget(f"{m / 1000}k parameters", sized([1])).limit for m in range(1, 5000)] == list(range(1, 5000))


@pytest.mark.parametrize("text", ["1e5 parameters", "-3 parameters", "1.2.3 parameters", "nan parameters", "a"])
def test_what_is_no_parameter_budget_is_refused_as_text(text):
    with pytest.raises(OptionError, match="300k parameters"):
        read_budget(text, sized([1, 1]))


@pytest.mark.parametrize(("text", "keep"), [("18", 18), ("0.5", 0.5), ("1.0", 1.0), ("3k params", "3k params")])
def test_keep_is_read_from_a_command_line_with_its_type(text, keep):
    assert read_keep(text) == keep
    assert type(read_keep(text)) is type(keep)  # 1 is one site, 1.0 is all of them


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
    assert expanded_ranks([r] * 2 * half, [r, 0] * half, [7] * 2 * half) == [2 * r, 0] * half


@given(st.integers(1, 64), st.data())
def test_with_equal_ranks_no_larger_rank_would_fit(r, data):
    _, kept, sizes = data.draw(plans())
    new = max(expanded_ranks([r] * len(kept), planned([r] * len(kept), kept), sizes)) + 1
    kept_sizes = sum(size for size, stays in zip(sizes, kept, strict=True) if stays)
    assert new * sum(kept) > r * len(kept) or new * kept_sizes > r * sum(sizes)


# -- a share of the scores -------------------------------------------------------------------------------------------


@given(SIZES.filter(lambda sizes: any(size > 0 for size in sizes)), st.integers(1, 100), st.data())
def test_the_kept_sites_have_the_share_and_without_the_worst_of_them_they_lack_it(sizes, percent, data):
    costs = tuple(data.draw(st.lists(st.integers(1, 5), min_size=len(sizes), max_size=len(sizes))))
    kept = GainShare(costs, Fraction(percent, 100)).choose([float(size) for size in sizes])
    wanted = Fraction(percent, 100) * sum(size for size in sizes if size > 0)
    worst = min(kept, key=lambda i: (Fraction(sizes[i], costs[i]), -i))
    assert all(sizes[i] > 0 for i in kept)
    assert sum(sizes[i] for i in kept) >= wanted > sum(sizes[i] for i in kept if i != worst)
    others = [Fraction(sizes[i], costs[i]) for i in range(len(sizes)) if i not in kept]
    assert max(others, default=Fraction(-9)) <= Fraction(sizes[worst], costs[worst])  # greedy by size per parameter


def test_without_a_positive_score_no_site_is_kept():
    assert GainShare((1, 1), Fraction(1, 2)).choose([0.0, -1.0]) == []


def test_a_share_needs_scores():
    for keep in ("auto", "60% gain"):
        assert check_keep(keep) == keep
        with pytest.raises(OptionError, match="needs scores, and this method has none"):
            read_budget(keep, FOUR)
    assert read_share("60% gain") == Fraction(3, 5)
    assert read_share("12.5 % gain") == Fraction(1, 8)
