"""What else the same money buys: plain LoRA, LoRA of a lower rank, with fewer steps, with a smaller micro-batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from weightlora.plan._data import PlanData
from weightlora.plan.run_time import run_time
from weightlora.text import natural

Known = Literal["counted", "measured", "estimated", "by definition"]
#: A trained parameter, its gradient and AdamW's two moments, four bytes each.
_BYTES = 4 * 4


@dataclass(frozen=True)
class Alternative:
    """A way to train, and what it costs beside plain LoRA on all sites at the user's rank."""

    name: str
    parameters: int
    """Trained adapter parameters, counted."""
    step_time: float
    """Of a step, relative to LoRA's."""
    training_time: float
    """Of the whole training, relative to LoRA's: that of scoring is included where the number of steps is known, and
    what a store saves where the plan was made for one."""
    time_known: Known
    memory: float
    """Bytes at the peak, or, where they were not counted, activations relative to LoRA's."""
    memory_known: Known


def alternatives(plan: PlanData) -> tuple[Alternative, ...]:
    """Return the plan, plain LoRA, and the trivial alternatives that need no selection; the plan comes first.

    - LoRA of a lower rank on all sites, with at most as many parameters;
    - LoRA of the user's rank for so many steps as take the plan's time;
    - LoRA with a smaller micro-batch and more accumulation. Its activations are estimated to be no more than the plan's;
      where peaks were counted, that of the smaller batch was not.

    Step times that were not measured are estimated: forward and backward pass take the same, and the backward pass
    stops at the floor, the lowest block with an adapter. So are activations: nothing below the floor is kept.

    Example:
        >>> from weightlora.model.sites import Site
        >>> from weightlora.plan.plan import AdapterPlan, PlannedSite
        >>> sites = [PlannedSite(Site(f"layer.{i}.q", 8, 8), 4, 8, r=4 * (i > 1), alpha=8, score=i) for i in range(4)]
        >>> [(row.name, row.parameters, row.step_time) for row in alternatives(AdapterPlan(tuple(sites)))]
        [('this plan', 128, 0.75), ('LoRA, rank 4', 256, 1.0), ('LoRA, rank 2', 128, 1.0), ('LoRA, 75 % of the steps', 256, 1.0), ('LoRA, micro-batch ÷ 2', 256, 1.0)]
    """  # noqa: E501 - one printed value
    return tuple(_rows(plan))


def floor_share(plan: PlanData) -> float:
    """Return the share of the blocks that lie below the lowest one with an adapter.

    Sites outside of the blocks, such as a pooler, are taken to lie above them. Of models without blocks it is 0.
    """
    blocks = sorted({entry.site.block for entry in plan.entries} - {""}, key=natural)
    kept = {entry.site.block for entry in plan.entries if entry.r} - {""}
    return min((blocks.index(block) for block in kept), default=0) / max(len(blocks), 1)


def floor_times(plan: PlanData) -> list[float]:
    """Return the time of the whole training with all adapters above each of five floors; none without a store."""
    epochs = plan.options.get("epochs")
    return [] if epochs is None else plan.options.get("floor_times") or [_stored(i / 6, epochs) for i in range(1, 6)]


def _stored(below: float, epochs: float) -> float:
    """The time of a training with a store, relative to LoRA's; passes in both directions are taken to be equal."""
    passes = (below, 1 - below)
    return run_time(1, epochs, passes, passes) / (2 * epochs)


def _rows(plan: PlanData) -> Iterator[Alternative]:
    below = floor_share(plan)
    measured = plan.options.get("step_time")
    time: float = (2 - below) / 2 if measured is None else float(measured)
    time_known: Known = "estimated" if measured is None else "measured"
    peak, of_lora = plan.options.get("peak_bytes"), plan.options.get("lora_peak_bytes")
    memory_known: Known = "estimated"
    memory, lora_memory = 1 - below, 1.0
    if peak is not None and of_lora is not None:
        memory_known, memory, lora_memory = "counted", float(peak), float(of_lora)
    steps = plan.spent.get("total_steps")
    scoring = plan.spent.get("scoring_steps", 0) / steps if steps else 0.0
    epochs, run = plan.options.get("epochs"), plan.options.get("run_time")  # a measured run includes the scoring
    each = time if epochs is None else _stored(below, epochs)
    whole = scoring + plan.step_share * each if run is None else float(run)
    yield Alternative("this plan", plan.parameters, time, whole, time_known, memory, memory_known)
    top = max(entry.lora_r for entry in plan.entries)
    of = plan.lora_parameters
    definition: Known = "by definition"
    yield Alternative(f"LoRA, rank {top}", of, 1.0, 1.0, definition, lora_memory, memory_known)
    lower = _lower_rank(plan, top)
    if lower is not None:
        r, parameters = lower
        adapters = _BYTES * (of - parameters) if memory_known == "counted" else 0.0
        yield Alternative(f"LoRA, rank {r}", parameters, 1.0, 1.0, "estimated", lora_memory - adapters, memory_known)
    if min(time, whole) < 0.995 and plan.step_share == 1:
        share = round(100 * whole)
        if share < 100:
            yield Alternative(
                f"LoRA, {share} % of the steps", of, 1.0, share / 100, definition, lora_memory, memory_known
            )
    if below or memory_known == "counted":
        activations = memory / lora_memory
        parts = math.ceil(1 / activations - 1e-9)
        if parts > 1:
            less = lora_memory / parts if memory_known == "estimated" else math.nan
            yield Alternative(f"LoRA, micro-batch ÷ {parts}", of, 1.0, 1.0, "estimated", less, "estimated")


def _lower_rank(plan: PlanData, top: int) -> tuple[int, int] | None:
    """The highest uniform rank below LoRA's with at most the plan's parameters, and its parameters."""
    sizes: Sequence[int] = [entry.site.parameters(1) for entry in plan.entries]
    fixed = plan.lora_parameters - sum(e.lora_r * s for e, s in zip(plan.entries, sizes, strict=True))
    r = min((plan.parameters - fixed) // max(sum(sizes), 1), top)
    return (r, r * sum(sizes) + fixed) if 0 < r < top else None
