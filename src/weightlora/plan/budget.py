"""From what the user may spend (a fraction, a count, parameters, memory, time) to which sites and which rank: pure."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from weightlora.errors import OptionError

Keep = float | int | str
"""How much stays: a fraction in (0, 1], a count, a parameter budget such as ``"300k parameters"``, memory such as
``"512MB"``, or step time such as ``"0.8x"``."""

_UNITS = {"": 1, "k": 1_000, "m": 1_000_000}
_BYTES = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_NUMBERS = 'a fraction in (0, 1], a count from 1 to {n}, or a parameter budget such as "300k parameters"'
_COSTS = 'memory such as "512MB" or "1.5GiB", or a step time of plain LoRA\'s such as "0.8x", at most "1x"'


@dataclass(frozen=True)
class Limit:
    """A budget in what a training step costs; which sites it pays for depends on the model and the batch."""

    text: str
    """As the user wrote it."""
    amount: Fraction
    unit: Literal["bytes", "LoRA steps"]


@dataclass(frozen=True)
class Budget:
    """What may be spent on the sites together, and what each of them costs.

    Example:
        >>> budget = Budget(costs=(3, 1, 1), limit=4)
        >>> budget.choose([9.0, 5.0, 7.0])
        [0, 2]
    """

    costs: tuple[int, ...]
    """Price of keeping each site: 1 where sites are counted, its parameters where those are."""
    limit: int
    """The most that the kept sites may cost together."""

    @classmethod
    def of_count(cls, k: int, *, n: int) -> Budget:
        """K of n sites, whatever their size."""
        return cls(costs=(1,) * n, limit=k)

    def choose(self, sizes: Sequence[float]) -> list[int]:
        """Return the kept positions, sorted: by descending size, passing over what no longer fits.

        Equal sizes are taken in the order they stand in, which is the order of the names.
        """
        chosen: list[int] = []
        left = self.limit
        for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):  # sorted() is stable: ties keep their order
            if self.costs[i] <= left:
                chosen.append(i)
                left -= self.costs[i]
        return sorted(chosen)


def read_budget(keep: Keep, parameters: Sequence[int]) -> Budget:
    """Turn the user's ``keep`` into a budget over sites whose adapters cost ``parameters`` each.

    Args:
        keep: A fraction of the n sites (rounded half to even, at least one), a count, or a parameter budget.
        parameters: Trainable parameters of an adapter at each site, in the order of the sites.

    Raises:
        OptionError: ``keep`` is out of its range, pays for no site, or is a :class:`Limit`.

    Example:
        >>> read_budget(0.5, [10, 10, 20, 20]).limit
        2
        >>> read_budget("35 parameters", [10, 10, 20, 20]).choose([4, 3, 2, 1])
        [0, 1]
    """
    n = len(parameters)
    allowed = f"{_NUMBERS.format(n=n)}, {_COSTS}"
    if isinstance(keep, str):
        if read_limit(keep) is not None:
            raise OptionError(
                f"keep={keep!r} has to be measured on a batch, and this method sees none; give {_NUMBERS.format(n=n)}"
            )
        limit = _read_parameters(keep, allowed)
        if limit < min(parameters):
            raise OptionError(
                f"keep={keep!r} pays for no site: the smallest of the {n} adapters has {min(parameters)} parameters; "
                "raise keep or lower r"
            )
        return Budget(tuple(parameters), limit)
    if isinstance(keep, bool) or not math.isfinite(keep) or keep <= 0:
        raise OptionError(f"keep={keep} is not allowed: give {allowed}")
    if isinstance(keep, int):
        if keep > n:
            raise OptionError(f"keep={keep} exceeds the {n} adapter sites; lower keep or widen target_modules")
        return Budget.of_count(keep, n=n)
    if keep > 1:
        raise OptionError(f"keep={keep} is not allowed: give {allowed}")
    return Budget.of_count(max(1, round(keep * n)), n=n)


def read_limit(keep: Keep) -> Limit | None:
    """Read a ``keep`` in bytes or in steps of plain LoRA; None where it is neither.

    Raises:
        OptionError: It is one of them with a number that it cannot have.

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


def require_keep(keep: Keep) -> None:
    """Raise unless ``keep`` can be a budget of some model.

    Raises:
        OptionError: It is out of its range, or its text is no budget.

    Example:
        >>> require_keep(0.5), require_keep("0.8x")
        (None, None)
    """
    allowed = f"{_NUMBERS.format(n='the number of sites')}, {_COSTS}"
    if isinstance(keep, str):
        if read_limit(keep) is None:
            _read_parameters(keep, allowed)
    elif isinstance(keep, bool) or not math.isfinite(keep) or keep <= 0 or (keep > 1 and not isinstance(keep, int)):
        raise OptionError(f"keep={keep} is not allowed: give {allowed}")


def expanded_ranks(ranks: Sequence[int], kept: Sequence[bool], sizes: Sequence[int], *, step: int = 1) -> list[int]:
    """Return the ranks of WeightLoRA+: the freed budget goes to the kept sites, all by the same factor.

    With equal ranks r this is r·n/K (2r at K = n/2), lowered where the kept layers are wide, so that neither the sum
    of ranks nor the number of parameters exceeds that of LoRA on all sites (paper, section 2.2).

    Args:
        ranks: Rank of each site under plain LoRA.
        kept: Which sites survive.
        sizes: in + out features of each site: the parameters of one rank.
        step: Each new rank is a multiple of this (so that lora_alpha can stay a whole number).

    Example:
        >>> expanded_ranks([8, 8, 8, 8], [True, False, True, False], [10, 10, 10, 10])
        [16, 0, 16, 0]
        >>> expanded_ranks([8, 8, 8, 8], [True, False, True, False], [20, 10, 20, 10])
        [12, 0, 12, 0]
    """
    places = range(len(ranks))
    all_ranks, kept_ranks = sum(ranks), sum(ranks[i] for i in places if kept[i])
    all_numbers = sum(ranks[i] * sizes[i] for i in places)
    kept_numbers = sum(ranks[i] * sizes[i] for i in places if kept[i])
    # Whole numbers throughout: rank·all/kept by floor division, so no rounding can cross the budget.
    grown = [min(r * all_ranks // kept_ranks, r * all_numbers // kept_numbers) // step * step for r in ranks]
    return [max(grown[i], ranks[i]) if kept[i] else 0 for i in places]


def warmup_steps(total_steps: int | None) -> int:
    """Return T: 0.5 % of the planned optimizer steps, at least 20.

    The paper's 0.5 % is two steps in a usual run, of which the first carries no information.

    Example:
        >>> warmup_steps(410), warmup_steps(10_000), warmup_steps(None)
        (20, 50, 20)
    """
    return 20 if total_steps is None else max(20, math.ceil(total_steps / 200))


def _read_parameters(keep: str, allowed: str) -> int:
    match = re.fullmatch(r"\s*([\d_.]+)\s*([kKmM]?)\s*(?:parameters|params)\s*", keep)
    try:
        number = float(match.group(1)) if match else math.nan
    except ValueError:
        number = math.nan
    if match is None or not number > 0:
        raise OptionError(f"keep={keep!r} is not allowed: give {allowed}")
    return int(Fraction(match.group(1)) * _UNITS[match.group(2).lower()])
