"""What ``weightlora bench --dry_run`` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightlora.cli._durations import duration
from weightlora.text import printable

if TYPE_CHECKING:
    from rich.table import Table

    from weightlora.bench.dry_run import DryRun


def cost_table(found: DryRun) -> Table:
    """Return a line for each kind of run, and one for all."""
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    several = len({kind.task for kind in found.kinds}) > 1
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), show_footer=True)
    totals = {"runs": f"{found.runs:,}", "steps": f"{found.steps:,}"}
    for name in ("kind of run", "runs", "steps", "one run", "all", "peak memory"):
        footer = {"kind of run": "all", **totals}.get(name, "")
        table.add_column(name, footer, justify="left" if name == "kind of run" else "right", no_wrap=name == "runs")
    for kind in found.kinds:
        name = printable(f"{kind.label}, {kind.task}" if several else kind.label)
        if kind.error:
            table.add_row(Text(name), f"{kind.runs:,}", "failed", "–", "–", "–")
        else:
            times = duration(kind.seconds), duration(kind.runs * kind.seconds)
            table.add_row(Text(name), f"{kind.runs:,}", f"{kind.runs * kind.steps:,}", *times, _size(kind.peak_bytes))
    return table


def cost_text(found: DryRun, *, on_ray: bool) -> str:
    """Return what the table leaves out: records, time with all workers, memory at once and what failed."""
    total = found.recorded + found.runs
    lines = [f"{found.recorded} of {total} runs have records."]
    if found.runs:
        place = "on the Ray cluster" if on_ray else "on this machine"
        at_once = "1 run at a time" if found.slots == 1 else f"{found.slots} runs at once"
        hours = f"{found.seconds / 3600:.2f} hours" + (f" ({duration(found.seconds)})" if found.seconds < 3600 else "")
        lines.append(f"The other {found.runs} take about {hours} {place}, {at_once}.")
        lines.append(f"Peak memory of {at_once}: {_size(found.peak_bytes)}.")
    failed = [kind for kind in found.kinds if kind.error]
    lines += [printable(f"{kind.label}, {kind.task} failed and is not counted: {kind.error}") for kind in failed]
    return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count else "–"
