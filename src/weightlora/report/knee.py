"""Knee plot of a plan: how much of the gain the best sites have, against parameters and depth of the backward pass.

The gain of a set of sites is the share of all positive scores that it has. Sites are taken in descending order of score
per parameter and in random orders for comparison. The same scores sort the sites and are added up, so noise in the
scores lifts the sorted curve too.
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean, quantiles
from typing import TYPE_CHECKING

from weightlora.errors import PlanError, require_extra
from weightlora.files import whole_file
from weightlora.plan.budget import AUTO, GainShare
from weightlora.plan.plan import AdapterPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: How texts name the gain of the budget of ``keep="auto"``.
AUTO_GAIN = f"{float(AUTO) * 100:.0f} % of the gain"
#: Random orders of the sites that the curve is compared with.
ORDERS = 200
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
class Panel:
    """Gain against one cost; both are shares from 0 to 1."""

    cost: tuple[float, ...]
    """Cost of the first 0, 1, …, n sites, as a share of plain LoRA's."""
    gain: tuple[float, ...]
    """Gain of the same sites."""
    auto: tuple[float, float]
    """Cost and gain of the smallest set with the share ``AUTO`` of the gain, which is the budget of ``keep="auto"``."""
    kept: tuple[float, float]
    """Cost and gain of what the plan keeps."""
    at: tuple[float, ...]
    """Costs at which the random orders are compared."""
    chance: tuple[Chance, ...]
    """Gain of random sites at these costs."""


@dataclass(frozen=True)
class Knee:
    """What is drawn, and the numbers of :func:`knee_text`."""

    rule: str
    order: tuple[str, ...]
    """The sites' names in descending order of score per parameter."""
    auto: int
    """The fewest first sites of ``order`` that have the share ``AUTO`` of the gain."""
    auto_by_chance: Chance
    """Share of the parameters at which a random order first has as large a share."""
    parameters: Panel
    """Cost: adapter parameters at plain LoRA's rank."""
    blocks: Panel | None
    """Cost: blocks that the backward pass crosses. None where the names do not number one stack of blocks."""


def has_gain(plan: AdapterPlan) -> bool:
    """Return whether the scores tell sites apart: there are two distinct positive ones.

    Example:
        >>> from weightlora.plan.plan import PlannedSite
        >>> from weightlora.model.sites import Site
        >>> sites = [PlannedSite(Site(name, 8, 8), 4, 8, r=4, alpha=8, score=1.0) for name in "ab"]
        >>> has_gain(AdapterPlan(tuple(sites)))
        False
    """
    return len({entry.score for entry in plan.entries if entry.score > 0}) > 1


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
        >>> knee.parameters.cost, knee.parameters.gain
        ((0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.75, 1.0, 1.0, 1.0))
        >>> knee.auto, knee.parameters.auto, knee.blocks.auto
        (1, (0.25, 0.75), (0.75, 0.75))
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
    auto = len(GainShare(sizes, AUTO).choose(gains))
    kept = [i for i, entry in enumerate(entries) if entry.r > 0]
    generator = random.Random(seed)
    orders = [generator.sample(order, len(order)) for _ in range(ORDERS)]
    grid = [i / (_POINTS - 1) for i in range(_POINTS)]

    def panel(costs: Callable[[Sequence[int]], list[float]], at: Sequence[float], read: _Read) -> Panel:
        cost, gain = costs(order), _gained(order, gains)
        curves = [(costs(one), _gained(one, gains)) for one in orders]
        chance = tuple(_chance([read(*curve, x) for curve in curves]) for x in at)
        of_kept = (costs(kept)[-1], math.fsum(gains[i] for i in kept) / math.fsum(gains)) if kept else (0.0, 0.0)
        return Panel(tuple(cost), tuple(gain), (cost[auto], gain[auto]), of_kept, tuple(at), chance)

    depths, blocks = _depths(plan), None
    if depths is not None:
        levels = [d / max(depths) for d in range(max(depths) + 1)]
        blocks = panel(lambda sites: _crossed(sites, depths), levels, _stepped)
    return Knee(
        rule=plan.rule,
        order=tuple(entries[i].site.name for i in order),
        auto=auto,
        auto_by_chance=_chance([_auto_at(_spent(one, sizes), _gained(one, gains)) for one in orders]),
        parameters=panel(lambda sites: _spent(sites, sizes), grid, _interpolated),
        blocks=blocks,
    )


def knee_text(knee: Knee) -> str:
    """Return one line: in how few sites and parameters most of the gain is, and how many random sites need.

    Both count whole sites. Random sites need about as large a share of the parameters, and more where sites are few.
    """
    cost, chance = knee.parameters.auto[0], knee.auto_by_chance
    by_chance = (
        f"{chance.mean:.0%} of the parameters for as much (8 of 10 orders: {chance.low:.0%} to {chance.high:.0%})"
    )
    parameters = f"{cost:.0%} of the parameters; random sites need {by_chance}".replace("%", " %")
    return f"{AUTO_GAIN} is in {knee.auto} of {len(knee.order)} sites with {parameters}"


def draw_knee(knee: Knee, path: str | Path) -> None:
    """Write the curves as a PNG, PDF or SVG, by the path's ending, whole or not at all.

    Raises:
        MissingPackageError: matplotlib is not installed.
        OutputError: The folder cannot be written.
    """
    require_extra("matplotlib", "report")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(knee.parameters, "adapter parameters, share of plain LoRA's", "default")]
    caption = "Gain: share of the sum of positive scores. Noise in the scores lifts the sorted curve too."
    if knee.blocks is not None:
        panels.append((knee.blocks, "blocks that the backward pass crosses", "steps-post"))
        caption += (
            "\nBlocks: from the lowest kept site to the highest candidate, share of plain LoRA's. They stand for step "
            "time; nothing was timed."
        )
    figure = Figure(figsize=(1.0 + 4.5 * len(panels), 4.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (panel, label, style) in zip(all_axes, panels, strict=True):
        _draw_panel(axes, panel, style)
        axes.set_xlabel(label, fontsize=9)
    all_axes[0].set_ylabel("gain")
    all_axes[0].legend(fontsize=7, loc="lower right")
    text = knee_text(knee).replace("; random", ";\nrandom")
    figure.suptitle(f"{knee.rule}: {text}", size=9)
    figure.supxlabel(caption, fontsize=7)
    with whole_file(path) as draft:
        figure.savefig(draft)


_Read = Callable[[Sequence[float], Sequence[float], float], float]


def _draw_panel(axes: Axes, panel: Panel, style: str) -> None:
    step = "post" if style == "steps-post" else None
    low, high = [one.low for one in panel.chance], [one.high for one in panel.chance]
    axes.fill_between(panel.at, low, high, step=step, color="#9aa5b1", alpha=0.4, label="random, 10 % to 90 %")
    mean = [one.mean for one in panel.chance]
    axes.plot(panel.at, mean, drawstyle=style, color="#5b6670", label=f"random, mean of {ORDERS} orders")
    axes.plot(panel.cost, panel.gain, drawstyle=style, color="#d95f02", label="best score per parameter first")
    axes.plot(*panel.auto, "D", color="black", markerfacecolor="white", label=AUTO_GAIN)
    axes.plot(*panel.kept, "o", color="black", label="kept by the plan")
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)


def _depths(plan: AdapterPlan) -> list[int] | None:
    """Blocks from each site to the highest candidate, both included; None where names do not say.

    Names give the order of one numbered stack alone. Two stacks, such as encoder and decoder, and sites outside the
    blocks, such as a pooler, run in an order that names do not tell.
    """
    found = [re.fullmatch(r"(.*?)(\d+)", entry.site.block) for entry in plan.entries]
    stacks = {match and match[1] for match in found}
    numbers = [int(match[2]) for match in found if match]
    if len(stacks) != 1 or None in stacks or min(numbers) == max(numbers):
        return None
    return [max(numbers) - number + 1 for number in numbers]


def _gained(sites: Sequence[int], gains: Sequence[float]) -> list[float]:
    """Gain of the first 0, 1, …, n of all sites; exactly 1 at the end."""
    sums = list(accumulate((gains[i] for i in sites), initial=0.0))
    return [one / sums[-1] for one in sums]


def _spent(sites: Sequence[int], sizes: Sequence[int]) -> list[float]:
    """Parameters of the first 0, 1, … of ``sites``, as a share of all sites'."""
    total = sum(sizes)
    return [one / total for one in accumulate((sizes[i] for i in sites), initial=0)]


def _crossed(sites: Sequence[int], depths: Sequence[int]) -> list[float]:
    """Blocks that the backward pass crosses for the first 0, 1, … of ``sites``, as a share of plain LoRA's."""
    total = max(depths)
    return [one / total for one in accumulate((depths[i] for i in sites), max, initial=0)]


def _interpolated(cost: Sequence[float], gain: Sequence[float], x: float) -> float:
    """Gain at the cost ``x``, along straight lines."""
    i = min(bisect_right(cost, x), len(cost) - 1)
    share = (x - cost[i - 1]) / (cost[i] - cost[i - 1])
    return (1 - share) * gain[i - 1] + share * gain[i]  # exact at both ends


def _stepped(cost: Sequence[float], gain: Sequence[float], x: float) -> float:
    """Gain of the most first sites that cost at most ``x``."""
    return gain[bisect_right(cost, x) - 1]


def _auto_at(cost: Sequence[float], gain: Sequence[float]) -> float:
    """Cost of the fewest first sites with the share ``AUTO`` of the gain."""
    return next(x for x, y in zip(cost, gain, strict=True) if y >= AUTO - _ROUNDING)


def _chance(values: Sequence[float]) -> Chance:
    tenths = quantiles(values, n=10, method="inclusive")
    return Chance(fmean(values), tenths[0], tenths[-1])
