"""One HTML page about one or several runs, made from their stored files; it asks no server for anything."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from weightlora import __version__
from weightlora.errors import DataError, PlanError, require_extra
from weightlora.files import read_json, read_mapping, write_text
from weightlora.plan.from_adapter import read_adapter
from weightlora.plan.heatmap import short_blocks
from weightlora.plan.plan import AdapterPlan
from weightlora.plan.projection_order import ordered_projections
from weightlora.report._plots import Figure, curves_plot, history_plot, knee_plot
from weightlora.report.knee import has_gain, knee_text, make_knee
from weightlora.runs.files import CONFIG_FILE, RESULTS_FILE, checkpoints
from weightlora.text import natural, printable

if TYPE_CHECKING:
    from weightlora.plan.plan import PlannedSite

_TEMPLATE = Path(__file__).with_name("page.html")
#: Bytes of a number in fp32, and of AdamW's two moments of it.
_NUMBER, _MOMENTS = 4, 8


@dataclass(frozen=True)
class StoredRun:
    """What a run left on disk."""

    name: str
    plan: AdapterPlan
    config: Mapping[str, Any]
    """Options of ``weightlora train``; empty where there is no ``config.yaml``."""
    losses: tuple[tuple[float, float], ...]
    """Step and training loss."""
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class _Cell:
    """A site in the heat map."""

    r: int
    level: int
    """How deep its colour is, by its score: from the lowest (0) to the highest (100) of the plan."""
    text: str
    """All that is known of it."""


def read_run(path: str | Path) -> StoredRun:
    """Return what is stored of a run: a folder of ``weightlora train`` or ``select``, an adapter, or a plan's file.

    Raises:
        PlanError: There is no plan and no adapter.
        DataError: A file is damaged.
    """
    path = Path(path)
    if path.is_file():
        return StoredRun(path.stem, AdapterPlan.load(path), {}, (), {})
    if not path.is_dir():
        raise PlanError(f"{path} does not exist; give a run's folder, an adapter or a plan.json")
    config = read_mapping(path / CONFIG_FILE) if (path / CONFIG_FILE).is_file() else {}
    results: dict[str, Any] = {}
    if (path / RESULTS_FILE).is_file():
        found = read_json(path / RESULTS_FILE)
        results = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    log = results.get("losses") or _logged(path)
    try:
        losses = tuple((float(step), float(loss)) for step, loss in log)
        metrics = {str(name): float(value) for name, value in dict(results.get("metrics") or {}).items()}
    except (TypeError, ValueError) as error:
        raise DataError(f"{path / RESULTS_FILE} is damaged: {error}") from error
    return StoredRun(path.resolve().name, read_adapter(path), config, losses, metrics)


def make_page(runs: Sequence[StoredRun]) -> str:
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
    plots: dict[str, Figure] = {}
    sections = [_section(i, name, run, plots) for i, (name, run) in enumerate(named.items())]
    losses = {name: run.losses for name, run in named.items() if run.losses}
    if losses:
        plots["curves"] = curves_plot(losses)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        version=__version__,
        sections=sections,
        losses=losses,
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


def _logged(folder: Path) -> list[tuple[Any, Any]]:
    """The losses in the state of the last checkpoint, for a run that has not ended."""
    for checkpoint in reversed(checkpoints(folder)):
        if (checkpoint / "trainer_state.json").is_file():
            state = read_json(checkpoint / "trainer_state.json")
            return [(entry["step"], entry["loss"]) for entry in state.get("log_history", ()) if "loss" in entry]
    return []


def _numbered(runs: Sequence[StoredRun]) -> Iterator[tuple[str, StoredRun]]:
    names = [printable(run.name) for run in runs]
    for i, (name, run) in enumerate(zip(names, runs, strict=True)):
        yield (name if names.count(name) == 1 else f"{name} ({i + 1})"), run


def _section(i: int, name: str, run: StoredRun, plots: dict[str, Figure]) -> dict[str, Any]:
    """What the page says of one run; its plots are added to ``plots``."""
    plan = run.plan
    knee = make_knee(plan) if has_gain(plan) else None
    if knee is not None:
        plots[f"knee-{i}"] = knee_plot(knee)
    if len(plan.history) > 1:
        plots[f"history-{i}"] = history_plot(plan)
    blocks = sorted({entry.site.block for entry in plan.entries}, key=natural)
    columns = ordered_projections(entry.site.projection for entry in plan.entries)
    cells = _cells(plan)
    rows = [
        (label, [cells.get((block, column)) for column in columns])
        for block, label in zip(blocks, short_blocks(blocks), strict=True)
    ]
    return {
        "id": i,
        "name": name,
        "plan": plan,
        "columns": columns,
        "rows": rows,
        "knee": None if knee is None else knee_text(knee),
        "has_history": f"history-{i}" in plots,
        "costs": list(_costs(plan)),
        "metrics": run.metrics,
        "config": json.dumps(run.config, indent=1, ensure_ascii=False) if run.config else "",
        "options": {"rule": plan.rule, "seed": plan.seed, **plan.options},
    }


def _cells(plan: AdapterPlan) -> dict[tuple[str, str], _Cell]:
    low = min(entry.score for entry in plan.entries)
    span = max(entry.score for entry in plan.entries) - low

    def cell(entry: PlannedSite) -> _Cell:
        level = round(100 * math.sqrt((entry.score - low) / span)) if span else 0  # else one high score hides the rest
        error = "" if entry.score_error is None else f" ± {entry.score_error:.2g}"
        kept = f"rank {entry.r}" if entry.r else "no adapter"
        return _Cell(entry.r, level, f"{entry.site.name}: {kept}, score {entry.score:.4g}{error}")

    return {(entry.site.block, entry.site.projection): cell(entry) for entry in plan.entries}


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


def _differences(named: Mapping[str, StoredRun]) -> Iterator[dict[str, Any]]:
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
