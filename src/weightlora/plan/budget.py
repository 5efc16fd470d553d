"""A budget over sites or single ranks: what is kept, given scores, costs and the most that may be spent.

It prefers the best scores, or the best of each part of the depth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from weightlora.errors import OptionError
from weightlora.model.sites import Site
from weightlora.text import natural

Ranking = Literal["score", "spread"]
"""How sites compete for the budget.

- ``"score"``: the highest score first.
- ``"spread"``: the highest score first within each part of the depth, and each part gets its share of the budget.
"""
RANKINGS: tuple[str, ...] = get_args(Ranking)


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


# -- what a budget prefers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """A budget of which each part of the depth gets its share, for its best sites.

    The blocks are divided into parts of about as many blocks each. The next site is always the best of those left in
    the part of which the smallest share is kept. There are as many parts as the budget can hold the best sites of, at
    most one for each block.

    Example:
        >>> Spread(Budget.of_count(2, n=4), blocks=("0", "1", "2", "3")).choose([1.0, 2.0, 4.0, 3.0])
        [1, 2]
    """

    budget: Budget
    blocks: tuple[str, ...]
    """The block of each site. Their numbers are the depth: sites are sorted by name, which puts block 10 before 2."""

    def choose(self, sizes: Sequence[float]) -> list[int]:
        """Return the kept positions, sorted; sites without a positive size come last."""
        depth = {block: k for k, block in enumerate(sorted(dict.fromkeys(self.blocks), key=natural))}
        chosen: list[int] = []
        for parts in range(len(depth), 0, -1):
            before = self._shares_before(sizes, [depth[block] * parts // len(depth) for block in self.blocks])
            order = sorted(before, key=lambda i: (sizes[i] <= 0, before[i], -sizes[i]))
            turns = {i: turn for turn, i in enumerate(order)}
            chosen = self.budget.choose([-turns[i] for i in range(len(sizes))])
            if {i for i in order if sizes[i] > 0 and before[i] == 0} <= {*chosen}:
                break
        return chosen

    def _shares_before(self, sizes: Sequence[float], part: Sequence[int]) -> dict[int, float]:
        """Return for each site what share of its part, in costs, the better sites of that part are."""
        total, better = [0] * (max(part) + 1), [0] * (max(part) + 1)
        for k, cost in zip(part, self.budget.costs, strict=True):
            total[k] += cost
        shares: dict[int, float] = {}
        for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            shares[i] = better[part[i]] / total[part[i]]
            better[part[i]] += self.budget.costs[i]
        return shares


def check_ranking(ranking: str | None) -> None:
    """Raise unless there is such a ranking; None is that of the rule.

    Raises:
        OptionError: There is none.
    """
    if ranking is not None and ranking not in RANKINGS:
        raise OptionError(f"ranking={ranking!r} is not allowed: give one of {', '.join(RANKINGS)}")


def ranked(budget: Chooser, ranking: str, sites: Sequence[Site]) -> Chooser:
    """Return the budget that prefers sites as ``ranking`` says.

    Args:
        budget: Any budget.
        ranking: One of :data:`Ranking`.
        sites: The candidates, in the order of the budget's costs.

    Raises:
        OptionError: There is no such ranking, or it does not go with this budget.
    """
    check_ranking(ranking)
    if ranking == "score":
        return budget
    if isinstance(budget, Budget):
        return Spread(budget, tuple(site.block for site in sites))
    raise OptionError(f"ranking={ranking!r} does not go with limits on time or memory; give ranking='score'")
