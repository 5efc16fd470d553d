"""What a budget prefers: the best scores, or the best of each part of the depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from weightlora.errors import OptionError
from weightlora.model.sites import Site
from weightlora.plan.budget import Budget, Chooser
from weightlora.text import natural

Ranking = Literal["score", "spread"]
"""How sites compete for the budget.

- ``"score"``: the highest score first.
- ``"spread"``: the highest score first within each part of the depth, and each part gets its share of the budget.
"""
RANKINGS: tuple[str, ...] = get_args(Ranking)


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
