"""The cost of a set of sites, and the best set within a limit. Pure numbers.

The cost of a site depends on the others. The backward pass stops at the lowest kept site, so that site costs the
backward pass of everything above it. Sites with the same input (query, key and value) save it once. So a cost is a list
of items, each with the sites that cause it; ``saved_bytes.py`` and ``step_time.py`` measure such lists.

Sets of sites are whole numbers: bit i is site i.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import fsum, inf

Cause = tuple[int, int]
"""Two sets of sites, ``(own, below)``; a cause holds when one site of each is kept. ``own`` are the sites whose adapter
does the operation. ``below`` are the sites whose gradient passes through it."""
#: The set of everything, as ``own`` of the frozen model's operations.
ANY = -1


@dataclass(frozen=True)
class Item:
    """Bytes of one storage, or nanoseconds of one operation.

    Example:
        >>> shared_input = Item(64, ((0b01, ANY), (0b10, ANY)))  # of sites 0 and 1
        >>> shared_input.is_caused_by(0b10), shared_input.is_caused_by(0b11), shared_input.is_caused_by(0b100)
        (True, True, False)
    """

    amount: int
    causes: tuple[Cause, ...]
    """The item counts once if any of these holds."""

    def is_caused_by(self, kept: int) -> bool:
        """Whether the set ``kept`` causes the item."""
        return any(own & kept and below & kept for own, below in self.causes)


@dataclass(frozen=True)
class Cost:
    """The cost of every set of ``n`` sites.

    Bit n is everything else that is trained, such as a head. It is in every set; its items are the cost of keeping no
    site.

    Example:
        >>> adapters = Item(1, ((0b01, 0b01),)), Item(1, ((0b10, 0b10),))
        >>> backward_of_site_1 = Item(10, ((ANY, 0b01),))  # the gradient of site 0 passes through it
        >>> cost = Cost(2, (*adapters, backward_of_site_1), order=(0, 1))
        >>> cost.of([]), cost.of([1]), cost.of([0]), cost.of([0, 1])
        (0, 1, 11, 12)
    """

    n: int
    items: tuple[Item, ...]
    order: tuple[int, ...]
    """The sites in the order of the forward pass."""

    def of(self, kept: Iterable[int]) -> int:
        """The cost of keeping exactly the sites at these positions."""
        sites = sum(1 << i for i in set(kept)) | 1 << self.n
        return sum(item.amount for item in self.items if item.is_caused_by(sites))

    def __add__(self, other: Cost) -> Cost:
        """The sum of both costs, in this one's order."""
        return make_cost(self.n, (*self.items, *other.items), self.order)

    @property
    def of_all(self) -> int:
        """The cost of plain LoRA."""
        return self.of(range(self.n))

    @cached_property
    def cheapest(self) -> int:
        """Position of the site with the lowest cost when kept alone; the first of equals."""
        return min(range(self.n), key=lambda i: self.of([i]))

    @cached_property
    def places(self) -> dict[int, int]:
        """Each site's place in the order of the forward pass."""
        return {i: place for place, i in enumerate(self.order)}

    @cached_property
    def least(self) -> tuple[int, ...]:
        """The least cost of each site: the items that only this site causes."""
        prices = [0] * self.n
        for i, places in enumerate(self.in_adapters):
            for place, below in places:
                if len(self.items[place].causes) == 1 and below >> i & 1:
                    prices[i] += self.items[place].amount
        return tuple(prices)

    @cached_property
    def on_the_way(self) -> tuple[int, ...]:
        """For each site, and for bit n, the items of the frozen model that it causes, as bits."""
        masks = [0] * (self.n + 1)
        for place, item in enumerate(self.items):
            for own, below in item.causes:
                for i in _bits(below & self._everything) if own == ANY else ():
                    masks[i] |= 1 << place
        return tuple(masks)

    @cached_property
    def in_adapters(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """For each site the ``(item, below)`` of its own adapter."""
        places: list[list[tuple[int, int]]] = [[] for _ in range(self.n)]
        for place, item in enumerate(self.items):
            for own, below in item.causes:
                for i in _bits(own & self._everything) if own != ANY else ():
                    places[i].append((place, below))
        return tuple(map(tuple, places))

    @cached_property
    def sharers(self) -> tuple[frozenset[int], ...]:
        """For each site the others whose adapters share an item with it."""
        users: dict[int, set[int]] = {}
        for i, places in enumerate(self.in_adapters):
            for place, _ in places:
                users.setdefault(place, set()).add(i)
        return tuple(
            frozenset[int]().union(*(users[place] for place, _ in places)) - {i}
            for i, places in enumerate(self.in_adapters)
        )

    @property
    def _everything(self) -> int:
        return (1 << self.n + 1) - 1


def make_cost(n: int, items: Iterable[Item], order: Iterable[int]) -> Cost:
    """Return a cost; items of equal causes are added up, and sites that ``order`` lacks come last.

    Example:
        >>> make_cost(2, [Item(1, ((1, 1),)), Item(2, ((1, 1),))], order=[1])
        Cost(n=2, items=(Item(amount=3, causes=((1, 1),)),), order=(1, 0))
    """
    amounts: dict[tuple[Cause, ...], int] = {}
    for item in items:
        causes = tuple(sorted(set(item.causes)))
        amounts[causes] = amounts.get(causes, 0) + item.amount
    whole_order = dict.fromkeys([*order, *range(n)])
    return Cost(n, tuple(Item(amount, causes) for causes, amount in amounts.items()), tuple(whole_order))


@dataclass(frozen=True)
class CostBudget:
    """A limit on the cost of the kept sites, where the cost of a site depends on the others.

    Example:
        >>> below, above = Item(1, ((0b01, 0b01),)), Item(1, ((0b10, 0b10),))
        >>> cost = Cost(2, (below, above, Item(10, ((ANY, 0b01),))), order=(0, 1))
        >>> CostBudget(cost, limit=5).choose([9.0, 5.0]), CostBudget(cost, limit=11).choose([9.0, 5.0])
        ([1], [0])
    """

    cost: Cost
    limit: int
    unit: int = 1
    """Unit of a price: 1 for bytes; for ratios, the time of a plain LoRA step."""

    def price(self, kept: Iterable[int]) -> float:
        """The cost of a set, in units."""
        return self.cost.of(kept) if self.unit == 1 else self.cost.of(kept) / self.unit

    def choose(self, sizes: Sequence[float]) -> list[int]:
        """Return the kept positions, sorted: sites of positive size within the limit, with a high total size.

        This is a knapsack whose cost depends on its lowest site. Several sets are tried, and the one of the largest
        total is returned:

        - for each site as the lowest: that site, then the sites above it by size per cost;
        - the same, starting with the largest other site that fits;
        - all sites by descending size, skipping those that no longer fit.

        By the last one, the total is never below that of a top K within the limit. Where the costs simply add up, it is
        at least half of the highest possible total; ``tests/cost/test_cost.py`` measures the difference.
        """
        ranked = sorted((i for i in range(self.cost.n) if sizes[i] > 0), key=lambda i: -sizes[i])
        best = _Knapsack(self)
        for i in ranked:
            best.add(i)
        best_size = best.size(sizes)
        for bound, lowest in sorted(self._bounds(ranked, sizes), reverse=True):
            if bound <= best_size:  # the bounds are sorted: no other is better
                break
            above = self._above(lowest, ranked)
            for sack in self._starts(lowest, above):
                sack.fill(above, sizes)
                if sack.size(sizes) > best_size:
                    best, best_size = sack, sack.size(sizes)
        return sorted(best.kept)

    def _above(self, lowest: int, sites: Sequence[int]) -> list[int]:
        places = self.cost.places
        return [i for i in sites if places[i] > places[lowest]]

    def _bounds(self, ranked: Sequence[int], sizes: Sequence[float]) -> Iterator[tuple[float, int]]:
        """For each site an upper bound of the total with it as the lowest: fractions of sites, at their least cost."""
        least = self.cost.least
        dense = sorted(ranked, key=lambda i: -_density(sizes[i], least[i]))
        for lowest in ranked:
            left = self.limit - self.cost.of([lowest])
            if left < 0:
                continue
            bound = sizes[lowest]
            for i in self._above(lowest, dense):
                if least[i] > left:
                    bound += sizes[i] * left / least[i]
                    break
                bound += sizes[i]
                left -= least[i]
            yield bound * (1 + 1e-9), lowest  # float sums in another order may be slightly larger

    def _starts(self, lowest: int, above: Sequence[int]) -> Iterator[_Knapsack]:
        """The lowest site alone, and with the largest site above it that also fits."""
        sack = _Knapsack(self)
        sack.add(lowest)
        yield sack
        sack = _Knapsack(self)
        sack.add(lowest)
        if any(sack.add(i) for i in above):  # by descending size; stops at the first that fits
            yield sack


class _Knapsack:
    """A knapsack while it is filled: its sites, and the items that they cause."""

    def __init__(self, budget: CostBudget) -> None:
        self._cost, self._limit = budget.cost, budget.limit
        self.kept: list[int] = []
        self._sites, self._counted, self._spent = 0, 0, 0
        self._open: list[tuple[int, int]] = []  # items of kept adapters that a lower site would cause
        self._count(1 << self._cost.n, self._cost.on_the_way[self._cost.n])

    def size(self, sizes: Sequence[float]) -> float:
        """The total size of the kept sites."""
        return fsum(sizes[i] for i in self.kept)

    def add(self, i: int) -> bool:
        """Add a site if it fits; return whether it was added."""
        new = self._new_items(i)
        if self._spent + self._amount(new) > self._limit:
            return False
        self.kept.append(i)
        self._open = [(place, below) for place, below in (*self._open, *self._cost.in_adapters[i])]
        self._count(1 << i, new)
        self._open = [(place, below) for place, below in self._open if not self._counted >> place & 1]
        return True

    def fill(self, sites: Iterable[int], sizes: Sequence[float]) -> None:
        """Add those of ``sites`` that fit, by descending size per cost."""
        left = set(sites) - set(self.kept)
        queue = [self._entry(i, sizes) for i in left]
        heapq.heapify(queue)
        while queue:
            _, i = heapq.heappop(queue)
            if i in left and self.add(i):
                left.remove(i)
                for other in self._cost.sharers[i] & left:  # a shared item is counted already: they cost less now
                    heapq.heappush(queue, self._entry(other, sizes))

    def _entry(self, i: int, sizes: Sequence[float]) -> tuple[float, int]:
        return -_density(sizes[i], self._amount(self._new_items(i))), i

    def _new_items(self, i: int) -> int:
        """The items that adding site ``i`` would add, as bits."""
        sites = self._sites | 1 << i
        new = self._cost.on_the_way[i]
        for place, below in (*self._cost.in_adapters[i], *self._open):
            if below & sites:
                new |= 1 << place
        return new & ~self._counted

    def _count(self, sites: int, items: int) -> None:
        self._sites |= sites
        self._spent += self._amount(items)
        self._counted |= items

    def _amount(self, items: int) -> int:
        return sum(self._cost.items[place].amount for place in _bits(items))


def _density(size: float, price: int) -> float:
    return size / price if price else inf


def _bits(number: int) -> Iterator[int]:
    """Positions of the 1 bits."""
    while number:
        lowest = number & -number
        yield lowest.bit_length() - 1
        number ^= lowest
