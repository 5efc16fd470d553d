"""The table of ``weightlora estimate --store``: what each floor takes in a training that stores what is frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from weightlora.cost.floors import FloorLine

#: What the rows and columns are.
FLOOR_LEGEND = """\
below    share of the blocks that lie below the lowest adapter; LoRA is on all
         sites above them
time     of the whole training ÷ LoRA's on all sites; products with weights
         alone are counted, so that a large output head is in it
away     weights below, which leave the device after the first epoch (offload)
weights  all others
saved    what the forward pass keeps for the backward pass
peak     the most at one moment of a later epoch
store    hidden states of all rows, in memory or on disk"""


def floor_table(lines: Sequence[FloorLine], title: str) -> Table:
    """Return the table."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, padding=0)
    for header in ("below", "sites", "time", "away", "weights", "grads", "optim", "saved", "logits", "peak", "store"):
        table.add_column(header, justify="right", no_wrap=True)
    for line in lines:
        m = line.memory
        parts = (m.weights, m.gradients, m.optimizer, m.saved, m.logits, m.peak, line.store)
        in_gb = map(in_gigabytes, (line.offloaded, *parts))
        table.add_row(line.name, str(line.sites), f"{line.time:.2f}", *in_gb)
    return table


def in_gigabytes(count: int) -> str:
    """Return a number of bytes in GB."""
    gb = count / 1e9
    return f"{gb:,.2f}" if gb < 99.995 else f"{gb:,.1f}" if gb < 999.95 else f"{gb:,.0f}"
