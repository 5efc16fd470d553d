"""Figures in the paper's form: curves with error bars and heat maps, as PNG, PDF or SVG."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from weightlora.errors import require_extra
from weightlora.files import whole_file

#: Colour-blind safe (Okabe and Ito).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKERS = "osD^vPX"
#: Letters of a title that fit into a panel.
_LETTERS = 55


@dataclass(frozen=True)
class Curve:
    """Values over a quantity, with the standard error of each."""

    label: str
    x: tuple[float, ...]
    """Empty: a value that does not depend on the quantity, drawn as a horizontal line."""
    y: tuple[float, ...]
    error: tuple[float, ...]
    """0 where one run has no error."""
    published: bool = False
    """Points of the paper, drawn without a line."""


@dataclass(frozen=True)
class Lines:
    """One pair of axes with curves."""

    title: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    few_ticks: bool = True
    """Whether up to twelve different values of x have a tick each, and no others."""


@dataclass(frozen=True)
class Heat:
    """One heat map; None where there is no value."""

    title: str
    x_label: str
    y_label: str
    value_label: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    limits: tuple[float, float] | None = None
    """Ends of the colour scale; None are the least and the largest value of all panels."""
    notes: tuple[tuple[str, ...], ...] = ()
    """What is written below each value, such as its error."""

    @property
    def known(self) -> list[float]:
        """All finite values that there are."""
        return [value for row in self.values for value in row if value is not None and math.isfinite(value)]


Panel = Lines | Heat


@dataclass(frozen=True)
class Picture:
    """Panels of one kind side by side."""

    title: str
    panels: tuple[Panel, ...]


def draw(picture: Picture, path: str | Path) -> None:
    """Write the picture as a PNG, PDF or SVG, by the path's ending, or nothing at all.

    Args:
        picture: At least one panel, and in heat maps at least one value.
        path: The file.

    Raises:
        MissingPackageError: matplotlib is not installed.
        OutputError: The folder cannot be written.
    """
    require_extra("matplotlib", "report")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(picture.panels))
    rows = math.ceil(len(picture.panels) / columns)
    figure = Figure(figsize=(5.0 * columns, 0.4 + 3.6 * rows), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    known = [value for panel in picture.panels if isinstance(panel, Heat) for value in panel.known]
    for place, panel in enumerate(picture.panels, start=1):
        axes = figure.add_subplot(rows, columns, place)
        axes.set_title(fill(panel.title, _LETTERS), size=10)
        axes.set_xlabel(panel.x_label)
        axes.set_ylabel(panel.y_label)
        if isinstance(panel, Heat):
            _draw_heat(figure, axes, panel, panel.limits or (min(known), max(known)))
        else:
            _draw_lines(axes, panel)
    figure.suptitle(fill(picture.title, columns * _LETTERS), size=11)
    with whole_file(path) as draft:
        figure.savefig(draft)


def _draw_lines(axes: Any, panel: Lines) -> None:
    for i, curve in enumerate(panel.curves):
        colour, marker = _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]
        if not curve.x:
            axes.axhline(curve.y[0], color=colour, linestyle="--", label=curve.label)
            axes.axhspan(curve.y[0] - curve.error[0], curve.y[0] + curve.error[0], color=colour, alpha=0.15)
            continue
        style = {"linestyle": "none", "markersize": 10, "fillstyle": "none"} if curve.published else {"markersize": 4}
        axes.errorbar(
            curve.x,
            curve.y,
            yerr=curve.error if any(curve.error) else None,
            color=colour,
            marker=marker,
            capsize=3,
            label=curve.label,
            **style,
        )
    values = sorted({x for curve in panel.curves for x in curve.x})
    if panel.few_ticks and 0 < len(values) <= 12:
        axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.legend(fontsize=8)


def _draw_heat(figure: Any, axes: Any, heat: Heat, limits: tuple[float, float]) -> None:
    low, high = limits
    numbers = [[math.nan if value is None else value for value in row] for row in heat.values]
    image = axes.imshow(numbers, cmap="viridis", aspect="auto", vmin=low, vmax=high)
    figure.colorbar(image, ax=axes, label=heat.value_label)
    axes.set_xticks(range(len(heat.columns)), heat.columns)
    axes.set_yticks(range(len(heat.rows)), heat.rows)
    for r, row in enumerate(heat.values):
        for c, value in enumerate(row):
            dark = value is not None and value < (low + high) / 2
            text = "–" if value is None else f"{value:.3g}"
            if heat.notes and heat.notes[r][c]:
                text += f"\n{heat.notes[r][c]}"
            axes.text(c, r, text, ha="center", va="center", size=8, color="white" if dark else "black")
