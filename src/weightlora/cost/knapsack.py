"""What a set of sites costs together, and the best set within a limit: pure numbers.

The price of a site depends on the others. The backward pass stops at the lowest kept site, so that all that lies above
it is paid as soon as that one is kept; and sites with the same input (query, key and value) save it once. So a cost is
a list of items, each with the sites that cause it; ``tracing.py`` reads such lists off a training step.

Sets of sites are whole numbers: bit i is site i.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import fsum, inf

Cause = tuple[int, int]
"""Two sets of sites, ``(own, below)``: it holds when one of each is kept. ``own`` are the sites whose adapter does it,
``below`` those from which a gradient is wanted through it."""
#: The set of everything: as ``own`` of what the frozen model does itself.
ANY = -1


@dataclass(frozen=True)
class Item:
    """Bytes of one storage, or nanoseconds of one operation.

    Example:
        >>> shared_input = Item(64, ((0b01, ANY), (0b10, ANY)))  # of sites 0 and 1
        >>> shared_input.is_paid(0b10), shared_input.is_paid(0b11), shared_input.is_paid(0b100)
        (True, True, False)
    """

    amount: int
    causes: tuple[Cause, ...]
    """Paid, once, where any of these holds."""

    def is_paid(self, kept: int) -> bool:
        """Whether the set ``kept`` causes it."""
        return any(own & kept and below & kept for own, below in self.causes)


@dataclass(frozen=True)
class Cost:
    """A price for every set of ``n`` sites.

    Bit n stands for all else that is trained, such as a head: it is in every set, and its items are the price of
    keeping no site.

    Example:
        >>> adapters = Item(1, ((0b01, 0b01),)), Item(1, ((0b10, 0b10),))
        >>> backward_of_site_1 = Item(10, ((ANY, 0b01),))  # the gradient has to pass it on the way down to site 0
        >>> cost = Cost(2, (*adapters, backward_of_site_1), order=(0, 1))
        >>> cost.of([]), cost.of([1]), cost.of([0]), cost.of([0, 1])
        (0, 1, 11, 12)
    """

    n: int
    items: tuple[Item, ...]
    order: tuple[int, ...]
    """The sites as the forward pass comes to them; the backward pass goes the other way."""

    def of(self, kept: Iterable[int]) -> int:
        """The price of keeping exactly the sites at these positions."""
        sites = sum(1 << i for i in set(kept)) | 1 << self.n
        return sum(item.amount for item in self.items if item.is_paid(sites))

    def __add__(self, other: Cost) -> Cost:
        """Both prices together, in this one's order."""
        return make_cost(self.n, (*self.items, *other.items), self.order)

    @property
    def of_all(self) -> int:
        """The price of plain LoRA."""
        return self.of(range(self.n))

    @cached_property
    def cheapest(self) -> int:
        """Position of the site that is cheapest to keep alone, the first of equals."""
        return min(range(self.n), key=lambda i: self.of([i]))

    @cached_property
    def places(self) -> dict[int, int]:
        """Where each site stands in the order."""
        return {i: place for place, i in enumerate(self.order)}

    @cached_property
    def least(self) -> tuple[int, ...]:
        """For each site what it costs whatever else is kept: the items that are its own alone."""
        prices = [0] * self.n
        for i, places in enumerate(self.in_adapters):
            for place, below in places:
                if len(self.items[place].causes) == 1 and below >> i & 1:
                    prices[i] += self.items[place].amount
        return tuple(prices)

    @cached_property
    def on_the_way(self) -> tuple[int, ...]:
        """For each site, and bit n, the items that the frozen model itself does for its sake, as bits."""
        masks = [0] * (self.n + 1)
        for place, item in enumerate(self.items):
            for own, below in item.causes:
                for i in _bits(below & self._everything) if own == ANY else ():
                    masks[i] |= 1 << place
        return tuple(masks)

    @cached_property
    def in_adapters(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """For each site the ``(item, below)`` that its own adapter does."""
        places: list[list[tuple[int, int]]] = [[] for _ in range(self.n)]
        for place, item in enumerate(self.items):
            for own, below in item.causes:
                for i in _bits(own & self._everything) if own != ANY else ():
                    places[i].append((place, below))
        return tuple(map(tuple, places))

    @cached_property
    def sharers(self) -> tuple[frozenset[int], ...]:
        """For each site the others whose adapters share an item with its own."""
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
    """Return the cost whose items of equal causes are added up; sites that ``order`` lacks come last.

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
    """The most that the kept sites may cost together, where the price of each depends on the others.

    Example:
        >>> below, above = Item(1, ((0b01, 0b01),)), Item(1, ((0b10, 0b10),))
        >>> cost = Cost(2, (below, above, Item(10, ((ANY, 0b01),))), order=(0, 1))
        >>> CostBudget(cost, limit=5).choose([9.0, 5.0]), CostBudget(cost, limit=11).choose([9.0, 5.0])
        ([1], [0])
    """

    cost: Cost
    limit: int
    unit: int = 1
    """What a price is told in: 1 for bytes, the time of a plain LoRA step for ratios."""

    def price(self, kept: Iterable[int]) -> float:
        """The price of a set, in units."""
        return self.cost.of(kept) if self.unit == 1 else self.cost.of(kept) / self.unit

    def choose(self, sizes: Sequence[float]) -> list[int]:
        """Return the kept positions, sorted: a set of positive sizes, within the limit, of a high total.

        A knapsack whose price depends on its lowest site. For each site that may be the lowest, and again
        with the largest other one that fits beside it, the rest is filled by size per cost from the sites above it;
        one more candidate goes by falling size and passes over what no longer fits, so that the total is never below
        that of any top K within the limit. Where prices simply add up, the total is at least half of the highest
        possible one; `tests/cost/test_cost.py` measures how far it is.
        """
        ranked = sorted((i for i in range(self.cost.n) if sizes[i] > 0), key=lambda i: -sizes[i])
        best = _Knapsack(self)
        for i in ranked:
            best.add(i)
        best_size = best.size(sizes)
        for bound, lowest in sorted(self._bounds(ranked, sizes), reverse=True):
            if bound <= best_size:  # nor can any of the others do better
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
        """For each site the most that it can come to as the lowest: with pieces of sites, at their least price."""
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
            yield bound * (1 + 1e-9), lowest  # sums of floats in another order may be larger by a hair

    def _starts(self, lowest: int, above: Sequence[int]) -> Iterator[_Knapsack]:
        """The lowest site alone, and with the largest of those above that fits beside it."""
        sack = _Knapsack(self)
        sack.add(lowest)
        yield sack
        sack = _Knapsack(self)
        sack.add(lowest)
        if any(sack.add(i) for i in above):  # they come by falling size, and the first that fits ends it
            yield sack


class _Knapsack:
    """The knapsack while it is filled: which sites are in it, and which items are paid."""

    def __init__(self, budget: CostBudget) -> None:
        self._cost, self._limit = budget.cost, budget.limit
        self.kept: list[int] = []
        self._sites, self._paid, self._spent = 0, 0, 0
        self._open: list[tuple[int, int]] = []  # what the kept adapters would do if a gradient were wanted below
        self._pay(1 << self._cost.n, self._cost.on_the_way[self._cost.n])

    def size(self, sizes: Sequence[float]) -> float:
        """What the kept sites come to."""
        return fsum(sizes[i] for i in self.kept)

    def add(self, i: int) -> bool:
        """Keep a site if it fits; return whether it does."""
        new = self._new_items(i)
        if self._spent + self._amount(new) > self._limit:
            return False
        self.kept.append(i)
        self._open = [(place, below) for place, below in (*self._open, *self._cost.in_adapters[i])]
        self._pay(1 << i, new)
        self._open = [(place, below) for place, below in self._open if not self._paid >> place & 1]
        return True

    def fill(self, sites: Iterable[int], sizes: Sequence[float]) -> None:
        """Keep of ``sites`` those of the most size per cost, one after the other."""
        left = set(sites) - set(self.kept)
        queue = [self._entry(i, sizes) for i in left]
        heapq.heapify(queue)
        while queue:
            _, i = heapq.heappop(queue)
            if i in left and self.add(i):
                left.remove(i)
                for other in self._cost.sharers[i] & left:  # the shared item is paid: they are cheaper now
                    heapq.heappush(queue, self._entry(other, sizes))

    def _entry(self, i: int, sizes: Sequence[float]) -> tuple[float, int]:
        return -_density(sizes[i], self._amount(self._new_items(i))), i

    def _new_items(self, i: int) -> int:
        """The items that keeping ``i`` too would add, as bits."""
        sites = self._sites | 1 << i
        new = self._cost.on_the_way[i]
        for place, below in (*self._cost.in_adapters[i], *self._open):
            if below & sites:
                new |= 1 << place
        return new & ~self._paid

    def _pay(self, sites: int, items: int) -> None:
        self._sites |= sites
        self._spent += self._amount(items)
        self._paid |= items

    def _amount(self, items: int) -> int:
        return sum(self._cost.items[place].amount for place in _bits(items))


def _density(size: float, price: int) -> float:
    return size / price if price else inf


def _bits(number: int) -> Iterator[int]:
    """Positions of the ones."""
    while number:
        lowest = number & -number
        yield lowest.bit_length() - 1
        number ^= lowest
