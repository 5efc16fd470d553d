"""One HTML page about one or several runs, made from their stored files; it asks no server for anything."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from weightlora import __version__
from weightlora.errors import DataError, PlanError, require_extra
from weightlora.files import is_deep, read_json, read_mapping, write_text
from weightlora.plan.heatmap import Shade, make_heatmap, short_blocks
from weightlora.plan.plan import AdapterPlan, read_adapter
from weightlora.report.knee import MARKED_GAIN, ORDERS, has_gain, knee_text, make_knee
from weightlora.runs.files import CONFIG_FILE, RESULTS_FILE, checkpoints
from weightlora.text import natural, one_line, printable, rounded

if TYPE_CHECKING:
    from weightlora.plan.plan import AdapterPlan
    from weightlora.report.knee import Knee

_TEMPLATE = Path(__file__).with_name("page.html")
_REPAIR = "correct it, or move it away"
#: Entries of the results that are shown, and their names.
_NUMBERS = {"selection_seconds": "selection, s", "training_seconds": "training, s", "steps": "steps"}
#: Bytes of a number in fp32, and of AdamW's two moments of it.
_NUMBER, _MOMENTS = 4, 8


@dataclass(frozen=True)
class SavedRun:
    """What a run left on disk."""

    name: str
    plan: AdapterPlan
    config: Mapping[str, Any]
    """Options of ``weightlora train``; empty where there is no ``config.yaml``."""
    losses: tuple[tuple[float, float], ...]
    """Step and training loss."""
    metrics: Mapping[str, float]
    numbers: Mapping[str, float] = field(default_factory=dict[str, float])
    """Seconds and steps, those that its results have."""
    written: str = ""
    """When its results were written, in UTC."""


def read_run(path: str | Path) -> SavedRun:
    """Return what is stored of a run: a folder of ``weightlora train`` or ``select``, an adapter, or a plan's file.

    Raises:
        PlanError: There is no plan and no adapter.
        DataError: A file is damaged.
    """
    path = Path(path)
    if path.is_file():
        return SavedRun(path.stem, AdapterPlan.load(path), {}, (), {})
    if not path.is_dir():
        raise PlanError(f"{path} does not exist; give a run's folder, an adapter or a plan.json")
    config = read_mapping(path / CONFIG_FILE) if (path / CONFIG_FILE).is_file() else {}
    if is_deep(config):
        raise DataError(f"{path / CONFIG_FILE} is nested too deeply; {_REPAIR}")
    file = path / RESULTS_FILE
    results = _mapping(file) if file.is_file() else {}
    with _named(file):
        losses = _points(results.get("losses") or [])
        metrics = {str(name): float(value) for name, value in dict(results.get("metrics") or {}).items()}
        numbers = {name: float(results[name]) for name in _NUMBERS if results.get(name) is not None}
    return SavedRun(
        name=path.resolve().name,
        plan=read_adapter(path),
        config=config,
        losses=losses or _logged(path),
        metrics=metrics,
        numbers=numbers,
        written=f"{datetime.fromtimestamp(file.stat().st_mtime, timezone.utc):%Y-%m-%d %H:%M}" if results else "",
    )


def make_page(runs: Sequence[SavedRun]) -> str:
    """Return the page as text: heat maps, curves, costs, what differs, and how to repeat each run.

    Args:
        runs: At least one; runs of the same name are numbered.

    Raises:
        MissingPackageError: Plotly or Jinja is not installed.
    """
    for package in ("plotly", "jinja2"):
        require_extra(package, "report")
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs

    named = dict(_numbered(runs))
    tasks = _distinct(run.config.get("task") for run in runs)
    models = _distinct(run.config.get("model_name_or_path") or run.plan.base_model for run in runs)
    plots: dict[str, Figure] = {}
    sections = [_section(i, name, run, plots) for i, (name, run) in enumerate(named.items())]
    losses = {name: run.losses for name, run in named.items() if run.losses}
    if losses:
        plots["curves"] = curves_plot(losses)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        version=__version__,
        today=f"{datetime.now(timezone.utc):%Y-%m-%d}",
        title=" on ".join(filter(None, (tasks, models))) or "weightlora report",
        sections=sections,
        lines=list(_lines(named)),
        has_losses=bool(losses),
        differences=list(_differences(named)),
        plots=_script(plots),
        plotly=get_plotlyjs(),
    )


def write_page(paths: Sequence[str | Path], output: str | Path) -> None:
    """Write the page about the runs in ``paths``, whole or not at all.

    Raises:
        PlanError: One of them holds no plan and no adapter.
        DataError: A file is damaged.
        MissingPackageError: Plotly or Jinja is not installed.
        OutputError: The page cannot be written.
    """
    write_text(output, make_page([read_run(path) for path in paths]))


def _logged(folder: Path) -> tuple[tuple[float, float], ...]:
    """The losses in the state of the last checkpoint, for a run that has not ended."""
    for checkpoint in reversed(checkpoints(folder)):
        file = checkpoint / "trainer_state.json"
        if file.is_file():
            state = _mapping(file)
            with _named(file):
                return _points((one["step"], one["loss"]) for one in state.get("log_history", ()) if "loss" in one)
    return ()


def _points(pairs: Iterable[Any]) -> tuple[tuple[float, float], ...]:
    return tuple((float(step), float(loss)) for step, loss in pairs)


def _mapping(file: Path) -> dict[str, Any]:
    content = read_json(file)
    if not isinstance(content, dict):
        raise DataError(f"{file} is damaged: it holds a {type(content).__name__}; {_REPAIR}")
    return cast("dict[str, Any]", content)


@contextmanager
def _named(file: Path) -> Generator[None]:
    """Say in which file there is something else than numbers."""
    try:
        yield
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{file} is damaged: {one_line(str(error))}; {_REPAIR}") from error


def _numbered(runs: Sequence[SavedRun]) -> Iterator[tuple[str, SavedRun]]:
    names = [printable(run.name) for run in runs]
    for i, (name, run) in enumerate(zip(names, runs, strict=True)):
        yield (name if names.count(name) == 1 else f"{name} ({i + 1})"), run


def _section(i: int, name: str, run: SavedRun, plots: dict[str, Figure]) -> dict[str, Any]:
    """What the page says of one run; its plots are added to ``plots``."""
    import yaml

    plan = run.plan
    knee = make_knee(plan) if has_gain(plan) else None
    if knee is not None:
        plots[f"knee-{i}"] = knee_plot(knee)
    if len(plan.history) > 1:
        plots[f"history-{i}"] = history_plot(plan)
    options = {"rule": plan.rule, "seed": plan.seed, **plan.options}
    heatmap = make_heatmap(plan)
    rows = [(row, list(map(_cell, cells))) for row, cells in zip(heatmap.rows, heatmap.cells, strict=True)]
    return {
        "id": i,
        "name": name,
        "plan": plan,
        "columns": heatmap.columns,
        "rows": rows,
        "knee": None if knee is None else knee_text(knee),
        "has_history": f"history-{i}" in plots,
        "scale": _scale(plan),
        "costs": list(_costs(plan)),
        "config": yaml.safe_dump(dict(run.config), allow_unicode=True, sort_keys=False) if run.config else "",
        "options": {name: rounded(one) if type(one) is float else one for name, one in options.items()},
    }


def _lines(named: Mapping[str, SavedRun]) -> Iterator[tuple[str, list[str]]]:
    """What the runs are compared by: its name, and the text of each run."""
    runs = list(named.values())
    yield "method", [printable(f"{run.config.get('method') or run.plan.rule!s:.40}") for run in runs]
    for metric in dict.fromkeys(metric for run in runs for metric in run.metrics):
        yield printable(metric), [_shown(run.metrics.get(metric)) for run in runs]
    yield "training loss, last logged", [_shown(run.losses[-1][1] if run.losses else None) for run in runs]
    yield "adapters", [f"{len(run.plan.names)} of {len(run.plan.entries)}" for run in runs]
    yield "parameters", [f"{run.plan.parameters:,}" for run in runs]
    yield "share of LoRA on all sites", [f"{run.plan.parameters / run.plan.lora_parameters:.1%}" for run in runs]
    for number, name in _NUMBERS.items():
        yield name, [_shown(run.numbers.get(number)) for run in runs]
    yield "results written, UTC", [run.written or "–" for run in runs]


def _shown(value: float | None) -> str:
    return "–" if value is None else rounded(value)


def _distinct(values: Iterable[Any]) -> str:
    """The values as texts, each once."""
    return ", ".join(dict.fromkeys(printable(f"{value!s:.80}") for value in values if value))


def _scale(plan: AdapterPlan) -> list[tuple[int, str]]:
    """Depths of colour and their scores, for the legend; one where all scores are equal."""
    scores = plan.scores.values()
    low, span = min(scores), max(scores) - min(scores)
    return [(level, rounded(low + span * (level / 100) ** 2)) for level in ((0, 25, 50, 75, 100) if span else (0,))]


def _cell(shade: Shade | None) -> dict[str, Any] | None:
    """A site in the heat map: its rank, how deep its colour is (0 to 100), and all that is known of it."""
    if shade is None:
        return None
    entry = shade.entry
    level = round(100 * math.sqrt(shade.level))  # else one high score hides the rest
    error = "" if entry.score_error is None else f" ± {entry.score_error:.2g}"
    kept = f"rank {entry.r}" if entry.r else "no adapter"
    return {"r": entry.r, "level": level, "text": f"{entry.site.name}: {kept}, score {entry.score:.4g}{error}"}


def _costs(plan: AdapterPlan) -> Iterator[tuple[str, int, int, float, float]]:
    """Name, sites, parameters, MB of AdamW's moments, and MB of the file in fp32."""
    lines = [
        ("LoRA on all sites", len(plan.entries), plan.lora_parameters),
        ("this plan", len(plan.names), plan.parameters),
    ]
    if "expand" not in plan.options and plan.parameters < plan.lora_parameters:
        grown = plan.expand()
        lines.append(("WeightLoRA+: this plan with LoRA's budget", len(grown.names), grown.parameters))
    for name, sites, parameters in lines:
        yield name, sites, parameters, parameters * _MOMENTS / 1e6, parameters * _NUMBER / 1e6


def _differences(named: Mapping[str, SavedRun]) -> Iterator[dict[str, Any]]:
    """What each further plan does otherwise than the first; plans for other models cannot be compared."""
    (first_name, first), *others = named.items()
    for name, run in others:
        if run.plan.fingerprint != first.plan.fingerprint:
            yield {"names": (first_name, name), "comparable": False, "rows": []}
            continue
        sites = sorted(run.plan.ranks, key=natural)
        ranks = [(site, first.plan.ranks[site], run.plan.ranks[site]) for site in sites]
        yield {"names": (first_name, name), "comparable": True, "rows": [row for row in ranks if row[1] != row[2]]}


def _script(plots: Mapping[str, Figure]) -> str:
    """JSON that is safe inside a script element: no name of a user can end it."""
    return json.dumps(plots, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


#: Colours that differ in lightness too, on white and on black: for whoever sees no difference of hue.
COLOURS = ("#d95f02", "#3b7dd8", "#1b9e77", "#c2479d", "#8a7a00", "#7a6ff0")
Figure = dict[str, Any]
#: Names of sites that fit into the history; of more, every second or third is shown.
_NAMES = 40
#: Of a curve: up to so many points are marked, and up to so many are no line.
_MARKED, _NO_LINE = 25, 2


def knee_plot(knee: Knee) -> Figure:
    """Return the share of the gain over the share of the parameters."""
    low, high, mean = ([getattr(one, name) for one in knee.chance] for name in ("low", "high", "mean"))
    return _figure(
        [
            _line("random, 10 %", knee.at, low, color="#9aa5b1", width=0, showlegend=False),
            _line("random, 10 % to 90 %", knee.at, high, color="#9aa5b1", width=0, fill="tonexty"),
            _line(f"random, mean of {ORDERS} orders", knee.at, mean, color="#7f8b97", dash="dot"),
            {
                **_line("best score per parameter first", knee.cost, knee.gain, color=COLOURS[0]),
                "text": ["no site", *knee.order],
                "hovertemplate": "%{text}<br>parameters %{x:.1%}, gain %{y:.1%}",
            },
            _point(MARKED_GAIN, knee.marked_point, "diamond-open"),
            _point("kept by the plan", knee.kept, "circle"),
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
