"""A plan as one screen of 80 columns: what was asked, what is kept, what it costs, and what else the money buys.

Else it buys plain LoRA, LoRA of a lower rank, with fewer steps, with a smaller micro-batch.
"""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from weightlora.plan._data import PlanData, PlannedSite
from weightlora.plan.heatmap import make_heatmap, ordered_projections, short_blocks, shortened
from weightlora.plan.limits import FLOORS, LIMITS, UNIFORM, run_time
from weightlora.text import natural

#: Most rows, columns and characters of the table; more blocks share rows, and the rarest projections share a column.
_ROWS, _COLUMNS, _WIDTH = 12, 8, 80
_OTHERS = "others"
#: Columns of the screen, and of the names of alternatives in it.
_SCREEN, _NAMES = 80, 28
Known = Literal["counted", "measured", "estimated", "by definition"]
#: A trained parameter, its gradient and AdamW's two moments, four bytes each.
_BYTES = 4 * 4


def headline(plan: PlanData) -> str:
    """Return how many adapters and parameters a plan keeps, as one line."""
    of = plan.lora_parameters
    share = f" ({plan.parameters / of:.1%})".replace("%", " %") if of else ""
    return f"{len(plan.names)} of {len(plan.entries)} adapters, {plan.parameters:,} of LoRA's {of:,} parameters{share}"


def summary(plan: PlanData) -> str:
    """Return the plan as text of one screen, for ``print(plan)``; a table of its ranks where they differ.

    Example:
        >>> from weightlora.model.sites import Site
        >>> from weightlora.plan.plan import AdapterPlan, PlannedSite
        >>> ranks = {"layer.0.q": 0, "layer.0.v": 0, "layer.1.q": 4, "layer.1.v": 4}
        >>> sites = [PlannedSite(Site(name, 8, 8), 4, 8, r=r, alpha=8, score=r) for name, r in ranks.items()]
        >>> print(summary(AdapterPlan(tuple(sites), rule="first_order", options={"adapters": 2})))
        asked     adapters=2
        rule      first_order
        kept      2 of 4 adapters, 128 of LoRA's 256 parameters (50.0 %)
                  floor: layer.1, the lowest block with an adapter
        <BLANKLINE>
        block  q  v
            0  ·  ·
            1  4  4
        rank of each adapter; · none
        <BLANKLINE>
                                      parameters  step time  whole training  memory
        this plan                            128      0.75×           0.75×   0.50×
        LoRA, rank 4                         256      1.00×           1.00×   1.00×
        LoRA, rank 2                         128      1.00×           1.00×   1.00×
        LoRA, 75 % of the steps              256      1.00×           0.75×   1.00×
        LoRA, micro-batch ÷ 2                256      1.00×           1.00×   0.50×
        parameters counted; time estimated; memory: activations, estimated
        <BLANKLINE>
        rate      that of LoRA
        note      a lower rank on all sites did better in our study: parameters=0.50
    """
    one_rank = len({entry.r for entry in plan.entries}) == 1
    table = [] if one_rank else ["", *_best_table(plan)]
    return "\n".join([*_asked(plan), *_kept(plan), *table, "", *_costs(plan), "", *_advice(plan)])


def rows_html(plan: PlanData) -> str:
    """Return the plan for a notebook: a table of blocks and projections shaded by score, and the screen's text.

    Example:
        >>> from weightlora.model.sites import Site
        >>> from weightlora.plan.plan import AdapterPlan, PlannedSite
        >>> rows_html(AdapterPlan((PlannedSite(Site("layer.0.q", 8, 8), 4, 8, r=4, alpha=8, score=1.0),)))[:7]
        '<table '
    """
    grid = make_heatmap(plan)
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in ("block", *grid.columns))
    rows: list[str] = []
    for name, cells in zip(grid.rows, grid.cells, strict=True):
        parts = [f"<th>{html.escape(name)}</th>"]
        for cell in cells:
            shade = 0.0 if cell is None else 0.6 * cell.level
            rank = "" if cell is None else str(cell.entry.r) if cell.entry.r else "·"
            title = "" if cell is None else f' title="{html.escape(cell.entry.site.name)}: {cell.entry.score:.3g}"'
            parts.append(f'<td{title} style="text-align:center;background:rgba(31,119,180,{shade:.2f})">{rank}</td>')
        rows.append(f"<tr>{''.join(parts)}</tr>")
    text = "\n".join([*_asked(plan), *_kept(plan), "", *_costs(plan), "", *_advice(plan)])
    return f'<table style="font-size:small"><tr>{heads}</tr>{"".join(rows)}</table><pre>{html.escape(text)}</pre>'


def _asked(plan: PlanData) -> Iterator[str]:
    limits = ", ".join(f"{name}={plan.options[name]!r}" for name in LIMITS if plan.options.get(name) is not None)
    rule = "none: nothing is scored" if plan.rule == "uniform" else shortened(plan.rule)
    yield _line("asked", limits or "–")
    yield _line("rule", rule)
    if plan.base_model:
        yield _line("model", shortened(plan.base_model))


def _kept(plan: PlanData) -> Iterator[str]:
    if plan.step_share < 1:
        instead = "" if plan.options.get("floor_gains") else "; to keep fewer layers instead, name a rule"
        yield _line("train", f"{100 * plan.step_share:.3g} % of the steps{instead}")
    if plan.batch_parts > 1:
        yield _line("train", f"{_rows_at_once(plan)}, {plan.batch_parts} times a batch; for fewer layers name a rule")
    if len(plan.names) == len(plan.entries) and all(entry.r == entry.lora_r for entry in plan.entries):
        yield _line("kept", f"nothing to select: all {len(plan.entries)} adapters at LoRA's rank fit")
        return
    yield _line("kept", headline(plan))
    blocks = sorted({entry.site.block for entry in plan.entries if entry.r > 0} - {""}, key=natural)
    if len(plan.names) == len(plan.entries):
        least, most = min(entry.r for entry in plan.entries), max(entry.r for entry in plan.entries)
        ranks = str(least) if least == most else f"{least} to {most}"
        selected = ", so that there is nothing to select" if plan.rule == UNIFORM else ""
        yield _line("", f"rank {ranks} on all sites{selected}")
    elif plan.rule == "uniform":
        yield _line("", "rank 1 on as many sites as fit, spread over depth and projections")
    elif blocks:
        yield _line("", f"floor: {shortened(blocks[0], 30)}, the lowest block with an adapter")


def _costs(plan: PlanData) -> Iterator[str]:
    rows = alternatives(plan)
    yield f"{'':{_NAMES}}  parameters  step time  whole training  memory"
    for row in rows:
        yield (
            f"{row.name:{_NAMES}}  {row.parameters:>10,}  {row.step_time:>8.2f}×  {row.training_time:>13.2f}×  "
            f"{_memory(row):>6}"
        )
    own = rows[0]
    what = "memory: peak, counted" if own.memory_known == "counted" else "memory: activations, estimated"
    yield f"parameters counted; time {own.time_known}; {what}"
    times = " ".join(f"{floor} {time:.2f}" for floor, time in zip(FLOORS, floor_times(plan), strict=False))
    if times:
        yield _line("floors", f"{plan.options['epochs']:g} epochs with a store: {times}")
    gains = plan.options.get("floor_gains") or []
    if gains:
        own = " ".join(f"{floor} {gain:.2f}" for floor, gain in zip(("all", *FLOORS), gains, strict=False))
        yield _line("gains", f"expected: {own}")


def _rows_at_once(plan: PlanData) -> str:
    rows = plan.options.get("lora_rows", "fewer")  # a plan of another hand may not say it
    return f"{rows} row{'s' * (rows != 1)} at once"


def _memory(row: Alternative) -> str:
    return f"{row.memory / 1e9:.2f}GB" if row.memory_known == "counted" else f"{row.memory:.2f}×"


def _advice(plan: PlanData) -> Iterator[str]:
    factor = plan.learning_rate_factor
    rate = plan.options.get("learning_rate")
    if factor == 1:
        yield _line("rate", "that of LoRA" if rate is None else f"that of LoRA, {rate:g}")
    else:
        own = "" if rate is None else f", {rate * factor:g} where LoRA has {rate:g}"
        who = ", which select_for sets" if plan.rule == UNIFORM else ""
        yield _line("rate", f"about {factor:g} times LoRA's{own}{who}")
    if {*plan.options} & {*LIMITS} == {"adapters"} and len(plan.names) < len(plan.entries):
        share = plan.parameters / plan.lora_parameters
        yield _line("note", f"a lower rank on all sites did better in our study: parameters={share:.2f}")
    own = alternatives(plan)[0]
    chosen = len(plan.names) < len(plan.entries)
    if chosen and plan.options.get("time") is not None and plan.options.get("epochs") is None:
        share = f"{100 * own.training_time:.0f} %"
        yield _line("note", f"LoRA with {share} of the steps takes as long: better on one task of two")
    steps, total = plan.spent.get("scoring_steps"), plan.spent.get("total_steps")
    if not steps:
        return
    of = f" ({100 * steps / total:.1f} % of {total:,})" if total else ""
    took = f"{steps} {'step' if steps == 1 else 'steps'}{of}"
    if plan.options.get("floor_gains"):  # the time that was asked for includes them
        yield _line("scoring", f"{took}, within the time")
        return
    spent = steps / total if total else 0.0
    saved = 1 - (own.step_time if plan.options.get("epochs") is None else own.training_time - spent)
    back = f"; pays back in time from step {math.ceil(steps / saved):,} on" if saved > 0.005 else ""
    yield _line("counting" if plan.rule == UNIFORM else "scoring", f"{took}{back}")


def _line(name: str, text: str) -> str:
    return f"{name:<10}{text}"[:_SCREEN]


def _best_table(plan: PlanData) -> list[str]:
    """The widest table that fits."""
    tables = (_table(plan, columns) for columns in range(_COLUMNS, 0, -1))
    return next(lines for lines in tables if max(map(len, lines)) <= _WIDTH)


def _table(plan: PlanData, most: int) -> list[str]:
    """Blocks by projections: the rank of each adapter, or how many of a group of sites carry one."""
    counts = Counter(entry.site.projection for entry in plan.entries)
    shown = {name for name, _ in counts.most_common(most if len(counts) <= most else most - 1)}
    columns = [name for name in ordered_projections(counts) if name in shown]
    columns += [_OTHERS] if len(counts) > len(shown) else []
    blocks = sorted({entry.site.block for entry in plan.entries}, key=natural)
    size = max(1, math.ceil(len(blocks) / _ROWS))
    named = [block for block in blocks if block]  # sites outside of the blocks, such as a pooler, have none
    names = {"": "–", **dict(zip(named, short_blocks(named), strict=True))}
    places: dict[tuple[int, str], list[PlannedSite]] = {}
    row_of = {block: i // size for i, block in enumerate(blocks)}
    for entry in plan.entries:
        column = entry.site.projection if entry.site.projection in shown else _OTHERS
        places.setdefault((row_of[entry.site.block], column), []).append(entry)
    heads = [[shortened(part, 12) for part in column.split(".")[-3:]] for column in columns]
    height = max(map(len, heads))
    heads = [["block"], *heads]
    lines = [[head[i - height] if height - i <= len(head) else "" for head in heads] for i in range(height)]
    for start in range(0, len(blocks), size):
        some = [shortened(names[block], 12) for block in blocks[start : start + size]]
        label = some[0] if len(some) == 1 else f"{some[0]}–{some[-1]}"
        lines.append([label, *(_cell(places.get((start // size, column), ())) for column in columns)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]
    grouped = any(len(some) > 1 for some in places.values())
    legend = "rank of each adapter; · none" + ("; 3/7: three of seven sites carry one" if grouped else "")
    texts = ["  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines]
    return [*(text.rstrip() for text in texts), legend]


def _cell(sites: Sequence[PlannedSite]) -> str:
    if len(sites) > 1:
        return f"{sum(entry.r > 0 for entry in sites)}/{len(sites)}"
    return "".join(str(entry.r) if entry.r > 0 else "·" for entry in sites)


# -- what else the money buys ------------------------------------------------------------------------------------------


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
    - LoRA with a smaller micro-batch and more accumulation: its activations are estimated to be no more than the plan's,
      or its peak was counted to be within the limit.

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
    if min(time, whole) < 0.995 and (below or plan.step_share == 1):
        share = round(100 * whole)
        if share < 100:
            yield Alternative(
                f"LoRA, {share} % of the steps", of, 1.0, share / 100, definition, lora_memory, memory_known
            )
    held = plan.options.get("lora_rows_peak_bytes")
    if held is not None and plan.batch_parts == 1:
        yield Alternative(f"LoRA, {_rows_at_once(plan)}", of, 1.0, 1.0, "estimated", float(held), "counted")
    elif below and memory_known == "estimated":
        parts = math.ceil(1 / memory - 1e-9)
        yield Alternative(f"LoRA, micro-batch ÷ {parts}", of, 1.0, 1.0, "estimated", 1 / parts, "estimated")


def _lower_rank(plan: PlanData, top: int) -> tuple[int, int] | None:
    """The highest uniform rank below LoRA's with at most the plan's parameters, and its parameters."""
    sizes: Sequence[int] = [entry.site.parameters(1) for entry in plan.entries]
    fixed = plan.lora_parameters - sum(e.lora_r * s for e, s in zip(plan.entries, sizes, strict=True))
    r = min((plan.parameters - fixed) // max(sum(sizes), 1), top)
    return (r, r * sum(sizes) + fixed) if 0 < r < top else None
