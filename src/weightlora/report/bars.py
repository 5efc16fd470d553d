"""The paper's Figure 2: a bar for each site's gradient dot product, with a star where the plan keeps the site."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from weightlora.plan.heatmap import new_figure, projection_key, save_figure, short_blocks
from weightlora.runs.gradient_study import DotProducts
from weightlora.text import natural

if TYPE_CHECKING:
    from rich.table import Table

#: Characters of the longest bar.
_WIDTH = 20


def terminal_bars(found: DotProducts) -> Table:
    """Return a table of the sites and their products, the largest first; readable without colour."""
    from rich.box import SIMPLE
    from rich.table import Table

    largest = max(map(abs, found.products.values())) or 1.0
    title = f"single adapters along the frozen model's gradient; ★ kept by {found.plan.rule}"
    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("#", justify="right")
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column("projection", no_wrap=True)
    table.add_column("⟨∇L, s·B·A⟩", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("★", justify="center", no_wrap=True)
    sites = _places(found)
    for place, name in enumerate(sorted(sites, key=lambda name: (-abs(found.products[name]), name)), start=1):
        bar = "█" * round(_WIDTH * abs(found.products[name]) / largest)
        star = "★" if name in found.plan.names else "·"
        last = place == len(found.plan.names)  # a line below the K largest
        table.add_row(str(place), *sites[name], f"{found.products[name]:.2e}", bar, star, end_section=last)
    return table


def overlap_text(found: DotProducts) -> str:
    """Return three lines: how far the plan agrees with the largest products, and two random choices for comparison."""
    overlap = found.overlap
    lines = (
        f"{overlap.shared} of the {overlap.k} sites with the largest products are kept by {found.plan.rule}; "
        f"Jaccard {overlap.jaccard:.2f}",
        f"at random: {overlap.by_chance:.1f} of {overlap.k} (K²/n, n = {overlap.n}); Jaccard "
        f"{overlap.jaccard_by_chance:.2f}; as many or more with probability {overlap.chance:.2g}",
        f"at random, but as many of each projection as {found.plan.rule} keeps: {found.by_chance_within:.1f} of "
        f"{overlap.k}",
    )
    return "\n".join(lines)


def draw_bars(found: DotProducts, path: str | Path) -> None:
    """Write the bars in the order of the forward pass as a PNG, PDF or SVG, by the path's ending, or nothing at all.

    Raises:
        MissingPackageError: matplotlib is not installed.
        OutputError: The folder cannot be written.
    """
    figure = new_figure(2.5 + 0.2 * len(found.plan.entries), 4.5)
    from matplotlib.patches import Patch

    sites = _places(found)
    projections = {entry.site.name: entry.site for entry in found.plan.entries}
    names = sorted(sites, key=lambda n: (natural(projections[n].block), projection_key(projections[n].projection)))
    sizes = [abs(found.products[name]) for name in names]
    kept = [name in found.plan.names for name in names]
    axes = figure.subplots()
    axes.bar(range(len(names)), sizes, color=["#d95f02" if one else "#9aa5b1" for one in kept])
    stars = [i for i, one in enumerate(kept) if one]
    axes.plot(stars, [sizes[i] for i in stars], "*", color="black", markersize=6)
    axes.set_xticks(range(len(names)), [" ".join(sites[name]) for name in names], rotation=90, fontsize=7)
    axes.set_xlim(-0.8, len(names) - 0.2)
    axes.set_ylabel("|⟨∇L(W0), s·B·A⟩|")
    overlap, rule = found.overlap, found.plan.rule
    axes.set_title(
        f"{overlap.shared} of the {overlap.k} largest are kept by {rule}; at random {overlap.by_chance:.1f}",
        size=9,
    )
    handles = [Patch(color="#d95f02", label=f"kept by {rule} (starred)"), Patch(color="#9aa5b1", label="not kept")]
    axes.legend(handles=handles, fontsize=7)
    save_figure(figure, path)


def _places(found: DotProducts) -> dict[str, tuple[str, str]]:
    """Return layer and projection of each site, by its name."""
    entries = found.plan.entries
    blocks = short_blocks([entry.site.block for entry in entries])
    return {entry.site.name: (block, entry.site.projection) for entry, block in zip(entries, blocks, strict=True)}
