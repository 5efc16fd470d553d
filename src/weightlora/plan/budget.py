"""A budget over sites or single ranks: what is kept, given scores, costs and the most that may be spent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from weightlora.errors import OptionError


class Chooser(Protocol):
    """A budget of any kind: it says which sites are kept, given their sizes."""

    def choose(self, sizes: Sequence[float]) -> list[int]:
        """Return the kept positions, sorted; sites of a larger size are preferred."""
        ...


@dataclass(frozen=True)
class Budget:
    """The cost of each site and the most that the kept sites may cost together.

    Example:
        >>> budget = Budget(costs=(3, 1, 1), limit=4)
        >>> budget.choose([9.0, 5.0, 7.0])
        [0, 2]
    """

    costs: tuple[int, ...]
    """Cost of keeping each site: 1 where sites are counted, else its adapter's parameters."""
    limit: int
    """The most that the kept sites may cost together."""
    fixed: tuple[int, ...] = ()
    """The part of each cost that does not shrink with the rank (DoRA's magnitude, B's bias); empty where it is 0."""

    @classmethod
    def of_count(cls, k: int, *, n: int) -> Budget:
        """A budget of K of n sites, whatever their size."""
        return cls(costs=(1,) * n, limit=k)

    def choose(self, sizes: Sequence[float]) -> list[int]:
        """Return the kept positions, sorted.

        Sites are taken by descending size; a site that no longer fits is skipped. Of equal sizes the first comes first.
        """
        chosen: list[int] = []
        left = self.limit
        for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):  # sorted() is stable: ties keep their order
            if self.costs[i] <= left:
                chosen.append(i)
                left -= self.costs[i]
        return sorted(chosen)


def expanded_ranks(
    ranks: Sequence[int], planned: Sequence[int], sizes: Sequence[int] | None = None, *, step: int = 1
) -> list[int]:
    """Return the ranks of WeightLoRA+, which spends the freed ranks on the kept sites, all by the same factor.

    Equal ranks r become r·n/K, 2r at K = n/2 (paper, section 2.2), or less where ``sizes`` are given and the kept
    layers are wide: then the number of parameters does not exceed that of LoRA on all sites.

    Args:
        ranks: Rank of each site under plain LoRA.
        planned: Rank of each site in the plan; 0 = no adapter.
        sizes: in + out features of each site, the parameters of one rank; None limits the sum of ranks alone.
        step: Each new rank is a multiple of this, so that lora_alpha can stay a whole number.

    Example:
        >>> expanded_ranks([8, 8, 8, 8], [8, 0, 8, 0])
        [16, 0, 16, 0]
        >>> expanded_ranks([8, 8, 8, 8], [8, 0, 8, 0], [20, 10, 20, 10])
        [12, 0, 12, 0]
    """
    bounds = [(sum(ranks), sum(planned))]
    if sizes is not None:
        bounds += [tuple(sum(r * size for r, size in zip(each, sizes, strict=True)) for each in (ranks, planned))]
    # Floor division of whole numbers: no rounding can cross the budget.
    return [max(min(r * most // now for most, now in bounds) // step * step, r) for r in planned]


def whole_budget(budget: Chooser) -> Budget:
    """Return the budget if it can be spent on single ranks.

    Raises:
        OptionError: It cannot.
    """
    if isinstance(budget, Budget):
        return budget
    raise OptionError(
        "single ranks are chosen within a number of adapters or parameters, and with ranking='score'; give adapters or "
        "parameters alone, change ranking, or give per='site'"
    )


def chosen_ranks(budget: Chooser, scores: Sequence[Sequence[float]]) -> list[int]:
    """Return the rank of each site: its ranks with the best scores for their parameters, within the budget.

    A rank costs what its adapter costs, divided by the adapter's rank; what does not shrink with the rank is paid with
    the first one. A rank without a positive score is not kept.

    Args:
        budget: A number of parameters or of adapters.
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
    if budget.fixed:
        return _within(budget, scores)
    worth = [size / cost for size, cost in zip(sizes, costs, strict=True)]
    ranks = [0] * len(scores)
    for i in Budget(costs, budget.limit * each).choose(worth):
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
