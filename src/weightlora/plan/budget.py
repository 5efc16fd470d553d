"""What ``keep`` allows: a fraction, a count, parameters, memory or step time becomes a budget over sites or ranks."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from typing import Literal, Protocol

from weightlora.errors import OptionError, WeightLoraWarning

Keep = float | int | str
"""How much of plain LoRA to keep.

- ``0.5``: at most this fraction, in (0, 1], of plain LoRA's adapter parameters.
- ``18``: this number of adapters, the paper's K. ``1`` is one adapter; ``1.0`` is all of them.
- ``"300k parameters"``: at most so many adapter parameters.
- ``"512MB"``: at most so much memory for the adapters' training.
- ``"0.8x"``: at most this fraction of plain LoRA's step time.
- ``"60% gain"``: as many adapter parameters as the smallest set takes that has this share of all positive scores;
  ``"auto"`` is 75 %.
"""

_UNITS = {"": 1, "k": 1_000, "m": 1_000_000}
_BYTES = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
#: The share of the positive scores that ``keep="auto"`` stands for.
AUTO = Fraction(3, 4)
_NUMBERS = 'a fraction of the parameters in (0, 1], a number of adapters, or parameters such as "300k parameters"'
_COSTS = (
    'memory such as "512MB" or "1.5GiB", a fraction of plain LoRA\'s step time such as "0.8x", at most "1x", a share '
    'of the scores such as "60% gain", or "auto"'
)


class Chooser(Protocol):
    """A budget of any kind: it says which sites are kept, given their sizes."""

    def choose(self, sizes: Sequence[float]) -> list[int]:
        """Return the kept positions, sorted; sites of a larger size are preferred."""
        ...


@dataclass(frozen=True)
class Limit:
    """A budget in memory or step time; which sites fit it depends on the model and the batch."""

    text: str
    """As the user wrote it."""
    amount: Fraction
    unit: Literal["bytes", "LoRA steps"]


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


@dataclass(frozen=True)
class GainShare:
    """The smallest set of sites that has a share of the gain: the scores decide how many are kept.

    Example:
        >>> GainShare(costs=(4, 1, 1), share=Fraction(1, 2)).choose([3.0, 3.0, 1.0])
        [1, 2]
    """

    costs: tuple[int, ...]
    """Parameters of each site's adapter."""
    share: Fraction
    """Of the sum of all positive sizes, in (0, 1]."""

    def choose(self, sizes: Sequence[float]) -> list[int]:
        """Return the kept positions, sorted: sites by descending size per parameter, until the share is reached."""
        gains = [max(size, 0.0) for size in sizes]
        missing = float(self.share) * math.fsum(gains)
        chosen: list[int] = []
        for i in sorted(range(len(gains)), key=lambda i: -gains[i] / self.costs[i]):
            if missing <= 0 or gains[i] == 0:
                break
            chosen.append(i)
            missing -= gains[i]
        return sorted(chosen)

    def budget_of(self, sizes: Sequence[float]) -> Budget:
        """Return a budget of as many parameters as the set has.

        Example:
            >>> GainShare(costs=(4, 1, 1), share=Fraction(1, 2)).budget_of([3.0, 3.0, 1.0]).limit
            2
        """
        return Budget(self.costs, sum(self.costs[i] for i in self.choose(sizes)))


def read_budget(keep: Keep, parameters: Mapping[str, int], fixed: Sequence[int] = ()) -> Budget:
    """Turn ``keep`` into a budget over sites.

    Args:
        keep: A fraction of the parameters, a count of sites, or a number of parameters; see :data:`Keep`.
        parameters: Trainable parameters of plain LoRA's adapter at each site, by the site's name.
        fixed: How many of them do not shrink with the rank, for budgets that are spent rank by rank.

    Raises:
        OptionError: ``keep`` is out of its range, no site fits it, or it is a :class:`Limit`.

    Warns:
        WeightLoraWarning: ``keep`` is 1.0, so that nothing is selected.

    Example:
        >>> parameters = {"a": 10, "b": 10, "c": 20, "d": 20}
        >>> read_budget(2, parameters).choose([4, 3, 2, 1])
        [0, 1]
        >>> read_budget(0.5, parameters).limit, read_budget(0.5, parameters).choose([4, 3, 2, 1])
        (30, [0, 1])
        >>> read_budget("35 parameters", parameters).choose([1, 2, 3, 4])
        [1, 3]
    """
    n, total = len(parameters), sum(parameters.values())
    number = check_keep(keep)
    if isinstance(number, int):
        if number > n:
            raise OptionError(f"keep={number} exceeds the {n} adapter sites; lower keep or widen target_modules")
        return Budget.of_count(number, n=n)
    if isinstance(number, float):
        if number == 1.0:
            text = f"keep={keep!r} is all of LoRA's parameters, so nothing is selected; keep=1 is one adapter"
            warnings.warn(f"{text}, keep=0.5 half of the parameters", WeightLoraWarning, stacklevel=2)
        # The decimal that the user wrote, not the float nearest to it: 0.1 of 30 parameters are 3.
        limit = math.floor(Fraction(str(float(number))) * total)
        share = f" ({limit:,} of plain LoRA's {total:,} parameters)"
    elif read_limit(number) is None and read_share(number) is None:
        limit, share = _read_parameters(number), ""
    elif read_limit(number) is None:
        raise OptionError(f"keep={keep!r} needs scores, and this method has none; give {_NUMBERS}")
    else:
        raise OptionError(f"keep={keep!r} has to be measured on a batch, and this method takes none; give {_NUMBERS}")
    smallest = min(parameters, key=lambda name: parameters[name])
    if limit < parameters[smallest]:
        raise OptionError(
            f"no site fits keep={keep!r}{share}: the smallest adapter, at {smallest}, has {parameters[smallest]:,}; "
            "raise keep or lower r"
        )
    return Budget(tuple(parameters.values()), limit, tuple(fixed) if any(fixed) else ())


def check_keep(keep: Keep) -> Keep:
    """Return ``keep`` with text read as a number where it is one; no model is needed.

    Raises:
        OptionError: ``keep`` is out of its range for any model.

    Example:
        >>> check_keep("0.5"), check_keep(18), check_keep("0.8x")
        (0.5, 18, '0.8x')
    """
    number = read_keep(keep) if isinstance(keep, str) else keep
    if isinstance(number, Real) and not isinstance(number, (bool, int, float)):  # NumPy's
        number = int(number) if isinstance(number, Integral) else float(number)
    if isinstance(number, str):
        if read_limit(number) is None and read_share(number) is None:
            _read_parameters(number)
    elif (
        isinstance(number, bool)
        or not isinstance(number, Real)
        or not 0 < number < math.inf
        or (isinstance(number, float) and number > 1)
    ):
        raise _not_allowed(keep)
    return number


def read_limit(keep: Keep) -> Limit | None:
    """Return ``keep`` as a limit in bytes or in steps of plain LoRA; None where it is neither.

    Raises:
        OptionError: Its number is out of range.

    Example:
        >>> read_limit("0.8x"), read_limit("300k parameters")
        (Limit(text='0.8x', amount=Fraction(4, 5), unit='LoRA steps'), None)
        >>> int(read_limit("1.5GB").amount), int(read_limit("1.5GiB").amount)
        (1500000000, 1610612736)
    """
    match = re.fullmatch(r"\s*(.*?)\s*([kmg]i?b|x)\s*", keep, re.IGNORECASE) if isinstance(keep, str) else None
    if match is None or not isinstance(keep, str):
        return None
    number, unit = match.group(1).replace("_", ""), match.group(2).lower()
    amount = Fraction(number) if re.fullmatch(r"\d+\.?\d*|\.\d+", number) else Fraction(0)
    if amount <= 0 or (unit == "x" and amount > 1):
        raise OptionError(f"keep={keep!r} is not allowed: give {_COSTS}")
    return Limit(keep, amount, "LoRA steps") if unit == "x" else Limit(keep, amount * _BYTES[unit], "bytes")


def read_share(keep: Keep) -> Fraction | None:
    """Return ``keep`` as a share of the scores; None where it is none.

    Raises:
        OptionError: The share is out of its range.

    Example:
        >>> read_share("auto"), read_share("60% gain"), read_share(0.5)
        (Fraction(3, 4), Fraction(3, 5), None)
    """
    if not isinstance(keep, str):
        return None
    if keep.strip().lower() == "auto":
        return AUTO
    match = re.fullmatch(r"\s*(\d+\.?\d*)\s*%\s*gain\s*", keep, re.IGNORECASE)
    if match is None:
        return None
    share = Fraction(match.group(1)) / 100
    if not 0 < share <= 1:
        raise OptionError(f"keep={keep!r} is not allowed: give a share of the scores above 0% and up to 100%")
    return share


def read_keep(text: str) -> Keep:
    """Read ``keep`` as written on a command line: ``0.5``, ``18``, ``300k parameters``, ``512MB`` or ``0.8x``.

    Example:
        >>> read_keep("0.5"), read_keep("18"), read_keep("300k parameters")
        (0.5, 18, '300k parameters')
    """
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def expanded_ranks(ranks: Sequence[int], planned: Sequence[int], sizes: Sequence[int], *, step: int = 1) -> list[int]:
    """Return the ranks of WeightLoRA+, which spends the freed budget on the kept sites, all by the same factor.

    Equal ranks r become r·n/K (2r at K = n/2), or less where the kept layers are wide: neither the sum of ranks nor the
    number of parameters exceeds that of LoRA on all sites (paper, section 2.2).

    Args:
        ranks: Rank of each site under plain LoRA.
        planned: Rank of each site in the plan; 0 = no adapter.
        sizes: in + out features of each site: the parameters of one rank.
        step: Each new rank is a multiple of this, so that lora_alpha can stay a whole number.

    Example:
        >>> expanded_ranks([8, 8, 8, 8], [8, 0, 8, 0], [10, 10, 10, 10])
        [16, 0, 16, 0]
        >>> expanded_ranks([8, 8, 8, 8], [8, 0, 8, 0], [20, 10, 20, 10])
        [12, 0, 12, 0]
    """
    places = range(len(ranks))
    all_ranks, kept_ranks = sum(ranks), sum(planned)
    all_numbers = sum(ranks[i] * sizes[i] for i in places)
    kept_numbers = sum(planned[i] * sizes[i] for i in places)
    # Floor division of whole numbers: no rounding can cross the budget.
    grown = [min(r * all_ranks // kept_ranks, r * all_numbers // kept_numbers) // step * step for r in planned]
    return [max(grown[i], planned[i]) for i in places]


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


def _read_parameters(keep: str) -> int:
    match = re.fullmatch(r"\s*([\d_.]+)\s*([kKmM]?)\s*(?:parameters|params)\s*", keep)
    try:
        number = float(match.group(1)) if match else math.nan
    except ValueError:
        number = math.nan
    if match is None or not number > 0:
        raise _not_allowed(keep)
    return int(Fraction(match.group(1)) * _UNITS[match.group(2).lower()])


def _not_allowed(keep: Keep) -> OptionError:
    return OptionError(f"keep={keep!r} is not allowed: give {_NUMBERS}, {_COSTS}")
