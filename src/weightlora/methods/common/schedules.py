"""Schedules of methods that change ranks during training: pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from weightlora.errors import OptionError


def cubic_budget(step: int, *, begin: int, end: int, high: int, low: int) -> int:
    """Return the ranks at ``step`` on a cubic curve from ``high`` at ``begin`` to ``low`` at ``end``, fast at first.

    low + (high − low)·(1 − (step − begin)/(end − begin))³, rounded down (AdaLoRA, Zhang et al. 2023, section 3.3).

    Example:
        >>> [cubic_budget(step, begin=10, end=20, high=80, low=16) for step in (5, 10, 15, 20, 30)]
        [80, 80, 24, 16, 16]
    """
    left = 1 - (min(max(step, begin), end) - begin) / (end - begin)
    return int((high - low) * left**3 + low)


def window(begin: float, end: float, total_steps: int) -> tuple[int, int]:
    """Return the first and the last step in which ranks change, from shares of the training.

    Raises:
        OptionError: There is no step between them.

    Example:
        >>> window(0.15, 0.5, 20)
        (3, 10)
    """
    first = math.ceil(round(begin * total_steps, 6))
    length = math.floor(round((end - begin) * total_steps, 6))
    if length < 1:
        raise OptionError(
            f"{total_steps} steps leave none between begin={begin} and end={end}; train longer or move them apart"
        )
    return first, first + length


def growth(scores: Sequence[float], ranks: Sequence[int], *, total: int, count: int, max_r: int) -> list[int]:
    """Return how many ranks each site gains: ``count`` by falling score, repeated until ``total`` is spent.

    Example:
        >>> growth([1.0, 3.0, 2.0], [1, 3, 1], total=4, count=2, max_r=4)
        [1, 1, 2]
    """
    gains, left = [0] * len(ranks), total
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    assert total <= sum(max_r - rank for rank in ranks), "max_r allows the total"
    while left:
        for i in order:
            gain = min(count, left, max_r - ranks[i] - gains[i])
            gains[i] += gain
            left -= gain
    return gains


def require_window(begin: float, end: float) -> None:
    """Raise unless ``begin`` and ``end`` are increasing shares of a training.

    Raises:
        OptionError: They are not.
    """
    if not 0 <= begin < end <= 1:
        raise OptionError(f"begin={begin} and end={end} are not allowed: give shares with 0 <= begin < end <= 1")
