"""Knee plot of a plan: how much of the gain the best sites have, against their parameters.

The gain of a set of sites is the share of all positive scores that it has. Sites are taken in descending order of score
per parameter and in random orders for comparison. The same scores sort the sites and are added up, so noise in the
scores lifts the sorted curve too.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean, quantiles

import numpy as np

from weightlora.errors import PlanError
from weightlora.plan.heatmap import new_figure, save_figure
from weightlora.plan.plan import AdapterPlan

#: The share of the gain that is marked, and how texts name it.
MARKED = 0.75
MARKED_GAIN = f"{MARKED:.0%} of the gain".replace("%", " %")
#: Random orders of the sites that the curve is compared with.
ORDERS = 200
#: The rule whose scores are a random order.
_DRAWN = "stratified"
#: Points at which the random orders' mean and band over the parameters are computed.
_POINTS = 101
#: Rounding of a sum of some thousand floats that must not cost a random order one more site.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Chance:
    """Mean, and 10 % and 90 % quantile, over the random orders."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Knee:
    """What is drawn, and the numbers of :func:`knee_text`. Costs and gains are shares from 0 to 1."""

    rule: str
    order: tuple[str, ...]
    """The sites' names in descending order of score per parameter."""
    cost: tuple[float, ...]
    """Adapter parameters of the first 0, 1, …, n sites of ``order`` at plain LoRA's rank."""
    gain: tuple[float, ...]
    """Gain of the same sites."""
    kept: tuple[float, float]
    """Cost and gain of what the plan keeps."""
    marked: int
    """The fewest first sites of ``order`` that have the share ``MARKED`` of the gain."""
    marked_by_chance: Chance
    """Share of the parameters at which a random order first has as large a share."""
    at: tuple[float, ...]
    """Costs at which the random orders are compared."""
    chance: tuple[Chance, ...]
    """Gain of random sites at these costs."""

    @property
    def marked_point(self) -> tuple[float, float]:
        """Cost and gain of the first ``marked`` sites."""
        return self.cost[self.marked], self.gain[self.marked]


def has_gain(plan: AdapterPlan) -> bool:
    """Return whether the scores tell sites apart: there are two distinct positive ones, which are no random numbers.

    Example:
        >>> from weightlora.plan.plan import PlannedSite
        >>> from weightlora.model.sites import Site
        >>> sites = [PlannedSite(Site(name, 8, 8), 4, 8, r=4, alpha=8, score=1.0) for name in "ab"]
        >>> has_gain(AdapterPlan(tuple(sites)))
        False
    """
    return plan.rule != _DRAWN and len({entry.score for entry in plan.entries if entry.score > 0}) > 1


def make_knee(plan: AdapterPlan, *, seed: int = 0) -> Knee:
    """Return the gain of the first 0, 1, …, n sites and its cost, with the same for random orders.

    Ranks are plain LoRA's: a plan of WeightLoRA+ gives the curve of the plan that it expands.

    Args:
        plan: A plan with scores.
        seed: Of the random orders.

    Raises:
        PlanError: No score is positive.

    Example:
        >>> from weightlora.plan.plan import PlannedSite
        >>> from weightlora.model.sites import Site
        >>> scores = {"layer.0.q": 1.0, "layer.1.q": 3.0, "layer.2.q": 0.0, "layer.3.q": 0.0}
        >>> knee = make_knee(AdapterPlan(tuple(
        ...     PlannedSite(Site(name, 8, 8), 4, 8, r=4, alpha=8, score=score) for name, score in scores.items()
        ... )))
        >>> knee.cost, knee.gain
        ((0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.75, 1.0, 1.0, 1.0))
        >>> knee.marked, knee.marked_point
        (1, (0.25, 0.75))
    """
    entries = plan.entries
    gains = [max(entry.score, 0.0) for entry in entries]
    if not any(gains):
        raise PlanError(
            f"no site of this plan has a positive score (rule {plan.rule!r}), and a knee plot needs them; select with "
            "a rule that scores sites, such as first_order"
        )
    sizes = plan.lora_sizes
    order = sorted(range(len(entries)), key=lambda i: -gains[i] / sizes[i])

    def curve(sites: Sequence[int]) -> tuple[list[float], list[float]]:
        """Cost and gain of the first 0, 1, … of all sites; exactly 1 at the end."""
        sums = ([0.0, *accumulate(numbers[i] for i in sites)] for numbers in (sizes, gains))
        cost, gain = ([one / every[-1] for one in every] for every in sums)
        return cost, gain

    cost, gain = curve(order)
    kept = [i for i, entry in enumerate(entries) if entry.r > 0]
    generator = random.Random(seed)
    curves = [curve(generator.sample(order, len(order))) for _ in range(ORDERS)]
    at = [i / (_POINTS - 1) for i in range(_POINTS)]
    return Knee(
        rule=plan.rule,
        order=tuple(entries[i].site.name for i in order),
        cost=tuple(cost),
        gain=tuple(gain),
        kept=(sum(sizes[i] for i in kept) / sum(sizes), math.fsum(gains[i] for i in kept) / math.fsum(gains)),
        marked=cost.index(_first_marked(cost, gain)),
        marked_by_chance=_chance([_first_marked(*one) for one in curves]),
        at=tuple(at),
        chance=tuple(map(_chance, np.array([np.interp(at, *one) for one in curves]).T.tolist())),
    )


def knee_text(knee: Knee) -> str:
    """Return one line: in how few sites and parameters most of the gain is, and how many random sites need.

    Both count whole sites. Random sites need about as large a share of the parameters, and more where sites are few.
    """
    cost, chance = knee.marked_point[0], knee.marked_by_chance
    by_chance = (
        f"{chance.mean:.0%} of the parameters for as much (8 of 10 orders: {chance.low:.0%} to {chance.high:.0%})"
    )
    parameters = f"{cost:.0%} of the parameters; random sites need {by_chance}".replace("%", " %")
    return f"{MARKED_GAIN} is in {knee.marked} of {len(knee.order)} sites with {parameters}"


def draw_knee(knee: Knee, path: str | Path) -> None:
    """Write the curves as a PNG, PDF or SVG, by the path's ending, whole or not at all.

    Raises:
        MissingPackageError: matplotlib is not installed.
        OutputError: The folder cannot be written.
    """
    figure = new_figure(5.5, 4.6)
    axes = figure.subplots()
    low, high, mean = ([getattr(one, name) for one in knee.chance] for name in ("low", "high", "mean"))
    axes.fill_between(knee.at, low, high, color="#9aa5b1", alpha=0.4, label="random, 10 % to 90 %")
    axes.plot(knee.at, mean, color="#5b6670", label=f"random, mean of {ORDERS} orders")
    axes.plot(knee.cost, knee.gain, color="#d95f02", label="best score per parameter first")
    axes.plot(*knee.marked_point, "D", color="black", markerfacecolor="white", label=MARKED_GAIN)
    axes.plot(*knee.kept, "o", color="black", label="kept by the plan")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="gain", xlabel="adapter parameters, share of plain LoRA's")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="lower right")
    text = knee_text(knee).replace("; random", ";\nrandom")
    figure.suptitle(f"{knee.rule}: {text}", size=9)
    caption = "Gain: share of the sum of positive scores. Noise in the scores lifts the sorted curve too."
    figure.supxlabel(caption, fontsize=7)
    save_figure(figure, path)


def _first_marked(cost: Sequence[float], gain: Sequence[float]) -> float:
    """The cost at which a curve first has the share ``MARKED`` of the gain."""
    return next(x for x, y in zip(cost, gain, strict=True) if y >= MARKED - _ROUNDING)


def _chance(values: Sequence[float]) -> Chance:
    tenths = quantiles(values, n=10, method="inclusive")
    return Chance(fmean(values), tenths[0], tenths[-1])
