"""A plan as one screen of 80 columns: what was asked, what is kept, what it costs, and what else the money buys."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Iterator, Sequence

from weightlora.plan._alternatives import Alternative, alternatives, floor_times
from weightlora.plan._data import PlanData, PlannedSite
from weightlora.plan.heatmap import make_heatmap, ordered_projections, short_blocks, shortened
from weightlora.plan.limits import LIMITS
from weightlora.plan.run_time import FLOORS
from weightlora.text import natural

#: Most rows, columns and characters of the table; more blocks share rows, and the rarest projections share a column.
_ROWS, _COLUMNS, _WIDTH = 12, 8, 80
_OTHERS = "others"
#: Columns of the screen, and of the names of alternatives in it.
_SCREEN, _NAMES = 80, 28


def headline(plan: PlanData) -> str:
    """Return how many adapters and parameters a plan keeps, as one line."""
    of = plan.lora_parameters
    share = f" ({plan.parameters / of:.1%})".replace("%", " %") if of else ""
    return f"{len(plan.names)} of {len(plan.entries)} adapters, {plan.parameters:,} of LoRA's {of:,} parameters{share}"


def summary(plan: PlanData) -> str:
    """Return the plan as text of one screen, for ``print(plan)``.

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
    lines = [*_asked(plan), *_kept(plan), "", *_best_table(plan), "", *_costs(plan), "", *_advice(plan)]
    return "\n".join(lines)


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
        yield _line("train", f"{100 * plan.step_share:.3g} % of the steps; to keep fewer layers instead, name a rule")
    if len(plan.names) == len(plan.entries) and all(entry.r == entry.lora_r for entry in plan.entries):
        yield _line("kept", f"nothing to select: all {len(plan.entries)} adapters at LoRA's rank fit")
        return
    yield _line("kept", headline(plan))
    blocks = sorted({entry.site.block for entry in plan.entries if entry.r > 0} - {""}, key=natural)
    if len(plan.names) == len(plan.entries):
        yield _line("", "all sites at a lower rank, so that there is nothing to select")
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


def _memory(row: Alternative) -> str:
    if math.isnan(row.memory):
        return "less"
    return f"{row.memory / 1e9:.2f}GB" if row.memory_known == "counted" else f"{row.memory:.2f}×"


def _advice(plan: PlanData) -> Iterator[str]:
    factor = plan.learning_rate_factor
    rate = plan.options.get("learning_rate")
    if factor == 1:
        yield _line("rate", "that of LoRA" if rate is None else f"that of LoRA, {rate:g}")
    else:
        own = "" if rate is None else f", {rate * factor:g} where LoRA has {rate:g}"
        yield _line("rate", f"about {factor:g} times LoRA's{own}")
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
    spent = steps / total if total else 0.0
    saved = 1 - (own.step_time if plan.options.get("epochs") is None else own.training_time - spent)
    back = f"; pays back in time from step {math.ceil(steps / saved):,} on" if saved > 0.005 else ""
    of = f" ({100 * steps / total:.1f} % of {total:,})" if total else ""
    yield _line("scoring", f"{steps} {'step' if steps == 1 else 'steps'}{of}{back}")


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
