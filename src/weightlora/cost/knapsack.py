"""The cost of a set of sites, and the best set within a limit. Pure numbers.

The cost of a site depends on the others. The backward pass stops at the lowest kept site, so that site costs the
backward pass of everything above it. Sites with the same input (query, key and value) save it once. So a cost is a list
of items, each with the sites that cause it; ``saved_bytes.py`` and ``step_time.py`` measure such lists.

Sets of sites are whole numbers: bit i is site i.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

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

    def in_adapters(self, kept: Iterable[int]) -> int:
        """The part of :meth:`of` that the kept adapters themselves cause: the most of it that can grow with the rank.

        Example:
            >>> Cost(1, (Item(2, ((0b1, 0b1),)), Item(10, ((ANY, 0b1),))), order=(0,)).in_adapters([0])
            2
        """
        sites = sum(1 << i for i in set(kept)) | 1 << self.n
        own = (item for item in self.items if all(cause[0] not in (ANY, 1 << self.n) for cause in item.causes))
        return sum(item.amount for item in own if item.is_caused_by(sites))


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


def additive_cost(amounts: Sequence[int]) -> Cost:
    """Return the cost of sites that do not depend on each other, such as their number or parameters.

    Example:
        >>> additive_cost([1, 5]).of([0, 1])
        6
    """
    return make_cost(len(amounts), [Item(amount, ((1 << i, 1 << i),)) for i, amount in enumerate(amounts)], order=())


@dataclass(frozen=True)
class CostBudget:
    """Limits on the costs of the kept sites, where the cost of a site may depend on the others. All of them hold.

    Example:
        >>> below, above = Item(1, ((0b01, 0b01),)), Item(1, ((0b10, 0b10),))
        >>> cost = Cost(2, (below, above, Item(10, ((ANY, 0b01),))), order=(0, 1))
        >>> CostBudget((cost,), (5,)).choose([9.0, 5.0]), CostBudget((cost,), (11,)).choose([9.0, 5.0])
        ([1], [0])
        >>> CostBudget((cost, additive_cost([1, 1])), (12, 1)).choose([9.0, 5.0])
        [0]
    """

    costs: tuple[Cost, ...]
    limits: tuple[int, ...]
    """The most of each cost."""

    def holds(self, kept: Iterable[int]) -> bool:
        """Whether all limits hold for these sites."""
        sites = list(kept)
        return all(cost.of(sites) <= limit for cost, limit in zip(self.costs, self.limits, strict=True))

    def choose(self, sizes: Sequence[float]) -> list[int]:
        """Return the kept positions, sorted: of all sets of sites within the limits, one of the largest total size.

        This is an integer program, solved by HiGHS: a variable for each site of positive size, one for each item, and
        one for each set of sites that an item lies above. Limits are checked again in whole numbers. After 20 seconds
        the best set found so far is taken.
        """
        tight = 1.0
        while tight > 0.5:
            kept = _solved(sizes, self.costs, [tight * limit for limit in self.limits])
            if self.holds(kept):
                return kept
            tight -= 1e-6 if tight > 1 - 1e-5 else 1e-3  # floating point may cross a limit by some 1e-7 of it
        return []


#: Seconds after which the best set so far is taken.
_PATIENCE = 20.0


def _solved(sizes: Sequence[float], costs: Sequence[Cost], limits: Sequence[float]) -> list[int]:
    """The sites that the solver keeps; none where nothing fits."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    n = len(sizes)
    rows = _Rows(n)
    for cost, limit in zip(costs, limits, strict=True):
        scale = max(limit, 1.0)
        spent: dict[int, float] = {}
        always = 0
        for item in cost.items:
            place = rows.caused(item.causes)
            if place is None:
                always += item.amount
            else:
                spent[place] = spent.get(place, 0.0) + item.amount / scale
        rows.add(spent, (limit - always) / scale)
    values = np.zeros(rows.count)
    values[:n] = [-max(size, 0.0) for size in sizes]
    highest = np.ones(rows.count)
    highest[:n] = [float(size > 0) for size in sizes]
    matrix = csr_array((rows.data, (rows.row, rows.column)), shape=(len(rows.most), rows.count))
    whole = np.zeros(rows.count)
    whole[:n] = 1
    found = milp(
        values / (-values.sum() or 1.0),
        constraints=LinearConstraint(matrix, ub=np.array(rows.most)),
        bounds=Bounds(0, highest),
        integrality=whole,
        options={"mip_rel_gap": 0.0, "time_limit": _PATIENCE},
    )
    return [] if found.x is None else [i for i in range(n) if found.x[i] > 0.5]


class _Rows:
    """The rows of a linear program over sites, "one of these sites is kept" and "this item is caused"."""

    def __init__(self, n: int) -> None:
        self.count = n
        self.data: list[float] = []
        self.row: list[int] = []
        self.column: list[int] = []
        self.most: list[float] = []
        self._always = 1 << n
        self._sets: dict[int, int] = {1 << i: i for i in range(n)}
        self._items: dict[tuple[Cause, ...], int] = {}

    def add(self, factors: Mapping[int, float], most: float) -> None:
        """Add Σ factor · variable ≤ most."""
        self.data += factors.values()
        self.column += factors
        self.row += [len(self.most)] * len(factors)
        self.most.append(most)

    def caused(self, causes: tuple[Cause, ...]) -> int | None:
        """The variable of an item; None where it is always there."""
        if len(causes) == 1 and causes[0][0] == ANY:
            return self._any_of(causes[0][1])
        if causes in self._items:
            return self._items[causes]
        place = self._items[causes] = self._new()
        for own, below in causes:
            # One of ``own`` and one of ``below``: x + y − 1 ≤ item, and x ≤ item where the first implies the second.
            parts = [self._any_of(own)] if own & ~below == 0 else [self._any_of(own), self._any_of(below)]
            places = [part for part in parts if part is not None]
            if not places:
                del self._items[causes]
                return None
            self.add({**dict.fromkeys(places, 1.0), place: -1.0}, len({*places}) - 1.0)
        return place

    def _any_of(self, sites: int) -> int | None:
        """The variable that is 1 where one of the sites is kept; None where one always is."""
        if sites & self._always:
            return None
        if sites not in self._sets:
            # Of a smaller set that is known, one variable stands for all.
            inner = max((known for known in self._sets if known & ~sites == 0), key=int.bit_count, default=0)
            place = self._new()
            for part in ([self._sets[inner]] if inner else []) + list(_bits(sites & ~inner)):
                self.add({part: 1.0, place: -1.0}, 0.0)
            self._sets[sites] = place
        return self._sets[sites]

    def _new(self) -> int:
        self.count += 1
        return self.count - 1


def _bits(number: int) -> Iterator[int]:
    """Positions of the 1 bits."""
    while number:
        lowest = number & -number
        yield lowest.bit_length() - 1
        number ^= lowest
