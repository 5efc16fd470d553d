"""A plan on one screen: how much is kept, by which rule, in which blocks and projections, and how to go on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from weightlora.plan.heatmap import short_blocks
from weightlora.plan.projection_order import ordered_projections
from weightlora.text import natural, printable

if TYPE_CHECKING:
    from weightlora.plan.plan import AdapterPlan, PlannedSite

#: Most rows, columns and characters of the table; more blocks share rows, and the rarest projections share a column.
_ROWS, _COLUMNS, _WIDTH = 12, 8, 96
#: Characters of a name of the user's; the end of a longer one is shown.
_LONGEST = 60
_OTHERS = "others"
_NEXT = (
    'next: trainer.train() after select_for, else plan.attach(base_model); plan.save("plan.json"),\n'
    "plan.to_lora_config() for a trainer that makes the adapters itself, plan.scores for every score"
)


def headline(plan: AdapterPlan) -> str:
    """Return how many adapters and parameters a plan keeps, as one line."""
    of = plan.lora_parameters
    share = f" ({plan.parameters / of:.1%})".replace("%", " %") if of else ""
    return f"{len(plan.names)} of {len(plan.entries)} adapters, {plan.parameters:,} of LoRA's {of:,} parameters{share}"


def summary(plan: AdapterPlan) -> str:
    """Return the plan as text of one screen, for ``print(plan)``.

    Example:
        >>> from weightlora.model.sites import Site
        >>> from weightlora.plan.plan import AdapterPlan, PlannedSite
        >>> ranks = {"layer.0.q": 0, "layer.0.v": 0, "layer.1.q": 4, "layer.1.v": 4}
        >>> sites = [PlannedSite(Site(name, 8, 8), 4, 8, r=r, alpha=8, score=r) for name, r in ranks.items()]
        >>> print(summary(AdapterPlan(tuple(sites), rule="first_order")).split("next:")[0].rstrip())
        2 of 4 adapters, 128 of LoRA's 256 parameters (50.0 %)
        rule: first_order
        lowest block with an adapter: layer.1
        <BLANKLINE>
        block  q  v
            0  ·  ·
            1  4  4
        rank of each adapter; · none
    """
    blocks = sorted({entry.site.block for entry in plan.entries if entry.r > 0} - {""}, key=natural)
    facts = [f"rule: {_short(plan.rule)}"]
    facts += [f"{name}: {_short(str(plan.options[name]))}" for name in ("keep", "steps") if name in plan.options]
    facts += [f"base model: {_short(plan.base_model)}"] if plan.base_model else []
    lowest = [f"lowest block with an adapter: {_short(blocks[0])}"] if blocks else []
    tables = (_table(plan, columns) for columns in range(_COLUMNS, 0, -1))
    table = next(lines for lines in tables if max(map(len, lines)) <= _WIDTH)
    return "\n".join([headline(plan), "; ".join(facts), *lowest, "", *table, "", _NEXT])


def _table(plan: AdapterPlan, most: int) -> list[str]:
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
    heads = [[_short(part, 12) for part in column.split(".")[-3:]] for column in columns]
    height = max(map(len, heads))
    heads = [["block"], *heads]
    lines = [[head[i - height] if height - i <= len(head) else "" for head in heads] for i in range(height)]
    for start in range(0, len(blocks), size):
        some = [_short(names[block], 12) for block in blocks[start : start + size]]
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


def _short(name: str, longest: int = _LONGEST) -> str:
    shown = " ".join(printable(name).splitlines())
    return shown if len(shown) <= longest else f"…{shown[1 - longest :]}"
