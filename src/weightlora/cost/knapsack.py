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
from time import monotonic
from typing import Any

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

        Each site in turn is taken as the first kept one of the forward pass. What depends on the depth is then known,
        and the other sites are an integer program that HiGHS solves. First sites whose bound, a knapsack of divisible
        sites, is not above the best set so far are passed over. After 20 seconds the best set so far is taken; it is
        usually found at once, and the rest of the time is spent on the proof.
        """
        best: list[int] = []
        value, until = 0.0, monotonic() + _PATIENCE
        bounds = _bounds(self.costs, self.limits, sizes)
        for first in sorted(bounds, key=lambda i: -bounds[i]):
            if bounds[first] <= value * (1 + _SAME) or monotonic() > until:
                break
            kept = self._with_first(first, sizes, value * (1 + _SAME), until)
            if sum(sizes[i] for i in kept) > value:
                best, value = kept, sum(sizes[i] for i in kept)
        return best

    def _with_first(self, first: int, sizes: Sequence[float], least: float, until: float) -> list[int]:
        """The best set whose first site in the forward pass is ``first``; none of a total size below ``least``."""
        order = self.costs[0].order
        dropped = sum(1 << i for i in order[: order.index(first)])
        costs = [_given(cost, 1 << first, dropped) for cost in self.costs]
        worth = [0.0 if dropped >> i & 1 or i == first else max(size, 0.0) for i, size in enumerate(sizes)]
        # Limits are checked again in whole numbers: floating point may cross one by some 1e-7 of it.
        for tight in (1.0, 1 - 1e-6, 1 - 1e-4):
            rest = _solved(worth, costs, [tight * limit for limit in self.limits], least - sizes[first], until)
            if self.holds([first, *rest]):
                return sorted([first, *rest])
        return []


#: Seconds after which the best set so far is taken, and the share of a total size below which two are the same.
_PATIENCE, _SAME = 20.0, 1e-6


def _given(cost: Cost, kept: int, dropped: int) -> Cost:
    """A cost where some sites are always kept, and others never: the items of the other sites."""

    def narrowed(sites: int) -> int:
        return sites if sites == ANY else 1 << cost.n if sites & (kept | 1 << cost.n) else sites & ~dropped

    items: list[Item] = []
    for item in cost.items:
        causes = [(narrowed(own), narrowed(below)) for own, below in item.causes]
        items.append(Item(item.amount, tuple((own, below) for own, below in causes if own and below)))
    return make_cost(cost.n, [item for item in items if item.causes], cost.order)


def _bounds(costs: Sequence[Cost], limits: Sequence[float], sizes: Sequence[float]) -> dict[int, float]:
    """For each first site that fits an upper bound of the total size of a set that begins with it.

    What several sites share is divided among them, and sites are divisible: neither makes a set dearer.
    """
    import numpy as np

    order = np.array(costs[0].order)
    worth = np.maximum(np.array(sizes, dtype=float), 0.0)
    found = dict.fromkeys([int(i) for i in order if worth[i] > 0], np.inf)
    for cost, limit in zip(costs, limits, strict=True):
        alone, more = _prices(cost)
        for place, first in enumerate(order):
            if int(first) not in found:
                continue
            left = limit - alone[first]
            if left < 0:
                del found[int(first)]
                continue
            later = order[place + 1 :]
            size, price = worth[later], more[first, later]
            with np.errstate(divide="ignore", invalid="ignore"):
                best_first = np.argsort(-np.where(price > 0, size / price, np.inf), kind="stable")
            size, price = size[best_first], price[best_first]
            before = np.cumsum(price) - price
            part = np.clip((left - before) / np.where(price > 0, price, 1.0), 0.0, 1.0)
            total = float(worth[first] + (size * np.where(price > 0, part, before <= left)).sum())
            found[int(first)] = min(found[int(first)], total)
    return found


def _prices(cost: Cost) -> tuple[Any, Any]:
    """What each site costs alone, and at least what each other site then costs more."""
    import numpy as np

    n, head = cost.n, 1 << cost.n
    alone, more = np.zeros(n), np.zeros((n, n))
    width = n // 8 + 1

    def bits(sites: int) -> Any:
        whole = sites if sites == ANY or not sites & head else ANY
        return np.unpackbits(
            np.frombuffer((whole & (head - 1)).to_bytes(width, "little"), dtype=np.uint8), bitorder="little"
        )[:n].astype(bool)

    for item in cost.items:
        parts = [(bits(own), bits(below), own) for own, below in item.causes]
        by_itself = np.logical_or.reduce([own & below for own, below, _ in parts])
        alone += item.amount * by_itself
        if any(own == ANY or own & head for _, _, own in parts):
            continue
        every = np.logical_or.reduce([own for own, _, _ in parts])
        places = np.flatnonzero(every)
        caused = np.logical_or.reduce([own[places] & (below[:, None] | below[places]) for own, below, _ in parts])
        more[:, places] += (caused & ~every[:, None]) * (item.amount / len(places))
    return alone, more


def _solved(
    sizes: Sequence[float], costs: Sequence[Cost], limits: Sequence[float], least: float, until: float
) -> list[int]:
    """The sites that the solver keeps; none where no set of a total size of ``least`` fits."""
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
    total = sum(sizes) or 1.0
    rows.add({i: -size / total for i, size in enumerate(sizes) if size > 0}, -least / total)
    values = np.zeros(rows.count)
    values[:n] = [-max(size, 0.0) / total for size in sizes]
    highest = np.ones(rows.count)
    highest[:n] = [float(size > 0) for size in sizes]
    matrix = csr_array((rows.data, (rows.row, rows.column)), shape=(len(rows.most), rows.count))
    whole = np.zeros(rows.count)
    whole[:n] = 1
    found = milp(
        values,
        constraints=LinearConstraint(matrix, ub=np.array(rows.most)),  # pyright: ignore[reportArgumentType]
        bounds=Bounds(0, highest),  # pyright: ignore[reportArgumentType]  # arrays, say scipy's documents
        integrality=whole,
        # Without presolve: with it HiGHS may write to standard output whatever "disp" says.
        options={"mip_rel_gap": _SAME, "time_limit": max(until - monotonic(), 0.1), "presolve": False},
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
