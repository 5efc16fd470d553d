"""The plots of a report as data for Plotly, which draws them in the browser; colours come from the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from weightlora.plan.heatmap import short_blocks
from weightlora.report.knee import AUTO_GAIN, ORDERS
from weightlora.text import natural

if TYPE_CHECKING:
    from weightlora.plan.plan import AdapterPlan
    from weightlora.report.knee import Knee, Panel

#: Colours that differ in lightness too, on white and on black: for whoever sees no difference of hue.
COLOURS = ("#d95f02", "#3b7dd8", "#1b9e77", "#c2479d", "#8a7a00", "#7a6ff0")
Figure = dict[str, Any]
#: Names of sites that the history has room for; of more, every second or third is shown.
_NAMES = 40
#: Of a curve: up to so many points are marked, and up to so many are no line.
_MARKED, _NO_LINE = 25, 2


def knee_plot(knee: Knee) -> Figure:
    """Return the share of the gain over the share of the parameters."""
    panel: Panel = knee.parameters
    low, high, mean = ([getattr(one, name) for one in panel.chance] for name in ("low", "high", "mean"))
    return _figure(
        [
            _line("random, 10 %", panel.at, low, color="#9aa5b1", width=0, showlegend=False),
            _line("random, 10 % to 90 %", panel.at, high, color="#9aa5b1", width=0, fill="tonexty"),
            _line(f"random, mean of {ORDERS} orders", panel.at, mean, color="#7f8b97", dash="dot"),
            {
                **_line("best score per parameter first", panel.cost, panel.gain, color=COLOURS[0]),
                "text": ["no site", *knee.order],
                "hovertemplate": "%{text}<br>parameters %{x:.1%}, gain %{y:.1%}",
            },
            _point(AUTO_GAIN, panel.auto, "diamond-open"),
            _point("kept by the plan", panel.kept, "circle"),
        ],
        x={"title": {"text": "adapter parameters, share of plain LoRA's"}, "tickformat": ".0%"},
        y={"title": {"text": "share of the gain"}, "tickformat": ".0%"},
    )


def history_plot(plan: AdapterPlan) -> Figure:
    """Return the scores or gates of each step, a row for each site, the best at the top."""
    order = sorted(range(len(plan.entries)), key=lambda i: plan.entries[i].score)
    rows = [[_short(step[i]) for step in plan.history] for i in order]
    names = [plan.entries[i].site.name for i in order]
    shown = slice((len(order) - 1) % _stride(order), None, _stride(order))  # the best is always named
    blocks = sorted({entry.site.block for entry in plan.entries}, key=natural)
    short = dict(zip(blocks, short_blocks(blocks), strict=True))
    labels = [f"{short[plan.entries[i].site.block]} {plan.entries[i].site.projection}" for i in order]
    return _figure(
        [
            {
                "type": "heatmap",
                "x": list(range(1, len(plan.history) + 1)),
                "y": names,
                "z": rows,
                "colorscale": "Viridis",
                "colorbar": {"title": {"text": "score"}, "thickness": 12},
                "hovertemplate": "%{y}<br>step %{x}: %{z:.4g}<extra></extra>",
            }
        ],
        x={"title": {"text": "step of the scoring"}},
        y={"tickvals": names[shown], "ticktext": labels[shown], "tickfont": {"size": 10}},
    )


def curves_plot(losses: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Return the training losses of several runs over their steps."""
    lines = [
        {
            **_line(name, [step for step, _ in points], [loss for _, loss in points], color=COLOURS[i % len(COLOURS)]),
            "mode": _mode(len(points)),
        }
        for i, (name, points) in enumerate(losses.items())
    ]
    return _figure(lines, x={"title": {"text": "step"}}, y={"title": {"text": "training loss"}})


def _figure(data: Sequence[Mapping[str, Any]], *, x: Mapping[str, Any], y: Mapping[str, Any]) -> Figure:
    layout = {
        "xaxis": dict(x),
        "yaxis": {**y, "automargin": True},
        "margin": {"l": 60, "r": 16, "t": 16, "b": 48},
        "legend": {"orientation": "h", "y": -0.25},
        "hovermode": "closest",
    }
    return {"data": list(data), "layout": layout}


def _line(name: str, x: Sequence[float], y: Sequence[float], *, color: str, width: float = 2, **more: Any) -> Figure:
    line = {"color": color, "width": width, **({"dash": more.pop("dash")} if "dash" in more else {})}
    numbers = {"x": [_short(v) for v in x], "y": [_short(v) for v in y]}
    return {"type": "scatter", "mode": "lines", "name": name, **numbers, "line": line, **more}


def _mode(count: int) -> str:
    """How so many points are drawn: a line through two would claim to know what was between them."""
    return "markers" if count <= _NO_LINE else "lines+markers" if count <= _MARKED else "lines"


def _stride(sites: Sequence[int]) -> int:
    return math.ceil(len(sites) / _NAMES)


def _point(name: str, at: tuple[float, float], symbol: str) -> Figure:
    marker = {"symbol": symbol, "size": 12, "color": COLOURS[1], "line": {"width": 2}}
    return {"type": "scatter", "mode": "markers", "name": name, "x": [at[0]], "y": [at[1]], "marker": marker}


def _short(value: float) -> float | None:
    """Four digits: a page of 560 sites and 200 steps stays small. JSON has no infinity."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
