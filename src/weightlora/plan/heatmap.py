"""Heat map of a plan: layer × projection, each site's score and whether it is kept."""

from __future__ import annotations

import math
import os.path
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from weightlora.errors import require_extra
from weightlora.files import whole_file
from weightlora.plan.plan import AdapterPlan
from weightlora.plan.projection_order import ordered_projections
from weightlora.text import natural, printable

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

_SHADES = " ░▒▓█"
#: Characters of a name in the picture; the end of a longer one is shown.
_LONGEST = 40


@dataclass(frozen=True)
class Cell:
    """One site in the grid."""

    level: float
    """Score scaled to [0, 1] over the plan; 0 where all scores are equal."""
    r: int
    """Planned rank; 0 = no adapter."""


@dataclass(frozen=True)
class Grid:
    """What is drawn: a row for each layer, a column for each projection, both in the order of the forward pass."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[Cell | None, ...], ...]
    """None where a layer has no such site."""


def make_grid(plan: AdapterPlan) -> Grid:
    """Return the plan's sites as a grid of layers and projections.

    Example:
        >>> from weightlora.plan.plan import PlannedSite
        >>> from weightlora.model.sites import Site
        >>> grid = make_grid(AdapterPlan((
        ...     PlannedSite(Site("layer.0.q", 8, 8), 4, 8, r=0, alpha=8, score=1.0),
        ...     PlannedSite(Site("layer.1.q", 8, 8), 4, 8, r=4, alpha=8, score=3.0),
        ... )))
        >>> grid.rows, grid.columns, [row[0].level for row in grid.cells]
        (('0', '1'), ('q',), [0.0, 1.0])
    """
    blocks = sorted({entry.site.block for entry in plan.entries}, key=natural)
    columns = ordered_projections(entry.site.projection for entry in plan.entries)
    low = min(entry.score for entry in plan.entries)
    span = max(entry.score for entry in plan.entries) - low
    found = {
        (e.site.block, e.site.projection): Cell((e.score - low) / span if span else 0.0, e.r) for e in plan.entries
    }
    return Grid(
        rows=short_blocks(blocks),
        columns=tuple(columns),
        cells=tuple(tuple(found.get((block, column)) for column in columns) for block in blocks),
    )


def short_blocks(blocks: Sequence[str]) -> tuple[str, ...]:
    """Return the blocks' names without their common beginning.

    Example:
        >>> short_blocks(["encoder.layer.1", "encoder.layer.10"])
        ('1', '10')
    """
    shared = len(re.sub(r"\d*$", "", os.path.commonprefix(blocks)))  # noqa: RUF071  (letters are meant)
    return tuple(block[shared:] or "–" for block in blocks)


def terminal_heatmap(plan: AdapterPlan) -> Table:
    """Return the grid as a rich table: shade = score, ● = kept, · = no adapter; readable without colour."""
    from rich.box import SIMPLE
    from rich.table import Table

    grid = make_grid(plan)
    title = f"{len(plan.names)} of {len(plan.entries)} sites kept by {plan.rule}"
    table = Table(
        title=title, caption=_CAPTION, box=SIMPLE, padding=(0, 1, 0, 0)
    )  # so that 7 projections fit 80 columns
    table.add_column("layer", justify="right", no_wrap=True)
    for column in grid.columns:
        table.add_column(column.replace(".", "\n"), justify="center", vertical="bottom")
    for row, cells in zip(grid.rows, grid.cells, strict=True):
        table.add_row(row, *(_cell_text(cell) for cell in cells))
    return table


def draw_heatmap(plan: AdapterPlan, path: str | Path) -> None:
    """Write the grid as a PNG, PDF or SVG, by the path's ending, whole or not at all.

    Raises:
        MissingPackageError: matplotlib is not installed.
        OutputError: The folder cannot be written.
    """
    require_extra("matplotlib", "report")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grid = make_grid(plan)
    height, width = len(grid.rows), len(grid.columns)
    figure = Figure(figsize=(2.5 + 0.75 * width, 2.2 + 0.32 * height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    levels = [[math.nan if cell is None else cell.level for cell in row] for row in grid.cells]
    image = axes.imshow(levels, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    kept = [(x, y, cell.r) for y, row in enumerate(grid.cells) for x, cell in enumerate(row) if cell and cell.r > 0]
    across, down = [x for x, _, _ in kept], [y for _, y, _ in kept]
    axes.plot(across, down, "o", markersize=9, markerfacecolor="white", markeredgecolor="black")
    for x, y, r in kept:
        axes.text(x, y, str(r), ha="center", va="center_baseline", fontsize=6)
    columns, rows = ([_label(name) for name in names] for names in (grid.columns, grid.rows))
    axes.set_xticks(range(width), columns, rotation=35, ha="right", fontsize=8, parse_math=False)  # $ is no formula
    axes.set_yticks(range(height), rows, fontsize=8, parse_math=False)
    axes.set_ylabel("layer")
    rule = _label(plan.rule)
    title = f"{rule}: {len(plan.names)} of {len(plan.entries)} sites kept\n(circle: rank)"
    axes.set_title(title, size=9, parse_math=False)
    low, high = min(plan.scores.values()), max(plan.scores.values())
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label(f"score: {rule}", parse_math=False)
    bar.set_ticks([0, 1], labels=[f"{low:.3g}", f"{high:.3g}"])
    with whole_file(path) as draft:
        # The same plan gives the same bytes: matplotlib's version is not written into a PNG.
        figure.savefig(draft, metadata={"Software": None} if draft.suffix.lower() == ".png" else None)


_CAPTION = "shade: score from low to high; ● kept, · no adapter"


def _cell_text(cell: Cell | None) -> str | Text:
    from rich.text import Text

    if cell is None:
        return ""
    shade = _SHADES[round(cell.level * (len(_SHADES) - 1))]
    return Text(f"{shade}●", style="bold green") if cell.r > 0 else Text(f"{shade}·", style="dim")


def _label(name: str) -> str:
    """A name short enough for the picture."""
    shown = " ".join(printable(name).splitlines())
    return shown if len(shown) <= _LONGEST else f"…{shown[1 - _LONGEST :]}"
