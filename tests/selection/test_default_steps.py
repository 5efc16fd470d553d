"""How many steps the default spends of a training of known length."""

import pytest

from weightlora.selection.steps import default_times


@pytest.mark.parametrize("has_head", [False, True])
@pytest.mark.parametrize("spent", [0, 1, 7])
def test_the_default_spends_at_most_three_per_cent_and_never_scores_on_one_batch(has_head, spent):
    for total in range(3000):
        head, times = default_times(total, has_head=has_head, spent=spent)
        if times:
            assert 100 * (head + times[-1] + spent) <= 3 * total
            assert times[-1] >= 2
            assert (head > 0) == has_head
        else:  # not even two steps, and one of a new head
            assert 100 * (2 + has_head + spent) > 3 * total
