"""A budget that is spent rank by rank instead of site by site."""

from __future__ import annotations

import math
from collections.abc import Sequence

from weightlora.errors import OptionError
from weightlora.plan.budget import Budget, Chooser, GainShare


def whole_budget(budget: Chooser) -> Budget | GainShare:
    """Return the budget if it can be spent on single ranks.

    Raises:
        OptionError: It cannot.
    """
    if isinstance(budget, Budget | GainShare):
        return budget
    raise OptionError(
        "single ranks are chosen within a fraction, a number of adapters or of parameters, or a share of the scores, "
        "and with ranking='score'; change keep or ranking, or give per='site'"
    )


def chosen_ranks(budget: Chooser, scores: Sequence[Sequence[float]]) -> list[int]:
    """Return the rank of each site: its ranks with the best scores for their parameters, within the budget.

    A rank costs what its adapter costs, divided by the adapter's rank; what does not shrink with the rank is paid with
    the first one. A rank without a positive score is not kept.

    Args:
        budget: A fraction, a number of parameters or of adapters, or a share of the scores.
        scores: The score of each rank of each site.

    Raises:
        OptionError: The budget is one of bytes or step time, or has a ranking: it can only be spent on whole adapters.

    Example:
        >>> chosen_ranks(Budget(costs=(8, 2), limit=6), [[5.0, 1.0], [2.0, 0.1]])
        [1, 2]
    """
    budget = whole_budget(budget)
    each = math.lcm(*map(len, scores))  # so that the cost of a rank is a whole number
    costs = tuple(cost * each // len(own) for cost, own in zip(budget.costs, scores, strict=True) for _ in own)
    sizes = [score for own in scores for score in own]
    site_of = [site for site, own in enumerate(scores) for _ in own]
    if not isinstance(budget, Budget):
        kept = GainShare(costs, budget.share).choose(sizes)
    elif budget.fixed:
        return _within(budget, scores)
    else:
        worth = [size / cost for size, cost in zip(sizes, costs, strict=True)]
        kept = Budget(costs, budget.limit * each).choose(worth)
    ranks = [0] * len(scores)
    for i in kept:
        ranks[site_of[i]] += sizes[i] > 0
    return ranks


def _within(budget: Budget, scores: Sequence[Sequence[float]]) -> list[int]:
    """The ranks under a budget with fixed costs: by falling score per parameter, skipping what no longer fits."""
    each = [(cost - fixed) // len(own) for cost, fixed, own in zip(budget.costs, budget.fixed, scores, strict=True)]
    worth = [
        (size * len(own) / budget.costs[site], site) for site, own in enumerate(scores) for size in own if size > 0
    ]
    ranks, left = [0] * len(scores), budget.limit
    for _, site in sorted(worth, key=lambda pair: -pair[0]):
        price = each[site] + (0 if ranks[site] else budget.fixed[site])
        if price <= left:
            ranks[site] += 1
            left -= price
    return ranks
