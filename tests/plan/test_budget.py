from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightlora.errors import OptionError
from weightlora.plan.budget import Budget, expanded_ranks, read_budget, read_keep, warmup_steps

SIZES = st.lists(st.integers(-3, 3), min_size=1, max_size=8)  # a narrow range: ties are common


@st.composite
def plans(draw, *, equal=False):
    """Ranks, kept flags (at least one) and sizes of some sites; with ``equal`` all of one rank and shape."""
    n = draw(st.integers(1, 12))
    rank, size = st.integers(1, 64), st.integers(2, 5000)
    ranks = [draw(rank)] * n if equal else draw(st.lists(rank, min_size=n, max_size=n))
    sizes = [draw(size)] * n if equal else draw(st.lists(size, min_size=n, max_size=n))
    kept = draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any))
    return ranks, kept, sizes


@pytest.mark.parametrize(
    "keep",
    [0, -1, -0.5, 0.0, float("nan"), float("inf"), 1.5, True, 5, "12 apples", "0 parameters", "3 parameters", ""],
)
def test_a_keep_out_of_range_is_one_line_with_the_value(keep):
    with pytest.raises(OptionError) as caught:
        read_budget(keep, [10, 10, 20, 20])
    assert f"keep={keep!r}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [1, 4, 0.01, 1.0, "10 parameters"])
def test_the_ends_of_the_range_are_allowed(keep):
    assert 1 <= len(read_budget(keep, [10, 10, 20, 20]).choose([4, 3, 2, 1])) <= 4


@pytest.mark.parametrize(
    ("keep", "n", "k"),
    [(1, 10, 1), (1.0, 10, 10), (7, 10, 7), (0.5, 36, 18), (0.3, 10, 3), (0.5, 5, 2), (0.5, 7, 4), (0.01, 10, 1)],
)
def test_a_count_is_itself_and_a_fraction_is_rounded_half_to_even_but_never_to_none(keep, n, k):
    assert read_budget(keep, [5] * n) == Budget(costs=(1,) * n, limit=k)


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 300))
def test_a_fraction_never_keeps_more_than_all_and_is_off_by_half_a_site_at_most(keep, n):
    limit = read_budget(keep, [1] * n).limit
    assert 1 <= limit <= n
    assert abs(limit - keep * n) <= 0.5 or limit == 1


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
    assert read_budget(keep, [10, 20]) == Budget(costs=(10, 20), limit=limit)


def test_a_decimal_parameter_budget_is_read_exactly():
    assert [read_budget(f"{m / 1000}k parameters", [1]).limit for m in range(1, 5000)] == list(range(1, 5000))


@pytest.mark.parametrize("text", ["1e5 parameters", "-3 parameters", "1.2.3 parameters", "nan parameters", "3", "0.5"])
def test_what_is_no_parameter_budget_is_refused_as_text(text):
    with pytest.raises(OptionError, match="300k parameters"):
        read_budget(text, [1, 1])


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
    new = expanded_ranks(ranks, kept, sizes, step=step)
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
    assert expanded_ranks(ranks, kept, sizes) == [ranks[0] * len(ranks) // sum(kept) * stays for stays in kept]


@given(st.integers(1, 64), st.integers(1, 10))
def test_half_of_the_sites_get_twice_the_rank(r, half):
    assert expanded_ranks([r] * 2 * half, [True, False] * half, [7] * 2 * half) == [2 * r, 0] * half


@given(st.integers(1, 64), st.data())
def test_with_equal_ranks_no_larger_rank_would_fit(r, data):
    _, kept, sizes = data.draw(plans())
    new = max(expanded_ranks([r] * len(kept), kept, sizes)) + 1
    kept_sizes = sum(size for size, stays in zip(sizes, kept, strict=True) if stays)
    assert new * sum(kept) > r * len(kept) or new * kept_sizes > r * sum(sizes)


@pytest.mark.parametrize(
    ("total", "t"), [(None, 20), (0, 20), (1, 20), (4000, 20), (4001, 21), (10_000, 50), (10_001, 51)]
)
def test_warmup_is_half_a_percent_rounded_up_and_at_least_twenty(total, t):
    assert warmup_steps(total) == t
