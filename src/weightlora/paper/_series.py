"""Records → the curves and heat maps of a figure, and the same numbers as a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightlora.bench.grid import Grid, Point, Record, Row, by_key
from weightlora.bench.table import Cell, Table, runs_behind, standard_error
from weightlora.paper.picture import Curve, Heat, Lines, Picture
from weightlora.paper.study import Study

Measure = Callable[[Row, Record], float | None]


def _metric(row: Row, record: Record) -> float | None:
    value = row.tested(record)
    return value if value is None or row.lower_is_better(row.metric) else 100 * value


def _megabytes(_: Row, record: Record) -> float | None:
    count = record.get("saved_bytes") if record["status"] == "ok" else None
    return None if count is None else count / 1e6


def _minutes(_: Row, record: Record) -> float | None:
    if record["status"] != "ok":
        return None
    return (record["selection_seconds"] + record["training_seconds"]) / 60


#: What ``axes.y`` may be.
MEASURES: Mapping[str, Measure] = {"metric": _metric, "saved_bytes": _megabytes, "minutes": _minutes}


@dataclass(frozen=True)
class _Mean:
    """A row's mean over the seeds, and its standard error."""

    row: Row
    values: tuple[float, ...]
    wanted: int
    """How many runs the mean should be of."""
    failed: int

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def error(self) -> float:
        return standard_error(self.values)

    def option(self, name: str) -> Any:
        return self.row.options.get(name)

    @property
    def complete(self) -> bool:
        return len(self.values) == self.wanted

    @property
    def text(self) -> str:
        if not self.values:
            return "failed" if self.failed else "–"
        missing = [] if self.complete else [f"({runs_behind(len(self.values), self.wanted, self.failed)})"]
        return " ".join([f"{self.mean:.4g}", *self._errors, *missing])

    @property
    def note(self) -> str:
        """Short lines below the mean in a cell of a heat map."""
        missing = [] if self.complete else [f"{len(self.values)} of {self.wanted} runs"]
        return "\n".join([*self._errors, *missing])

    @property
    def _errors(self) -> list[str]:
        return [f"± {self.error:.2g}"] if len(self.values) > 1 and math.isfinite(self.error) else []


def lines(study: Study, grid: Grid, records: Sequence[Record], *, with_points: bool) -> tuple[Table, Picture | None]:
    """Return the curves: one a method, over the option ``axes.x``; a method without it is a horizontal line.

    Args:
        study: Its axes say what is drawn.
        grid: The benchmark.
        records: What there is of it.
        with_points: Draw the paper's own points too, where the set-up is the paper's.
    """
    axes = study.axes
    means = _means(grid, records, MEASURES[axes["y"]])
    panels: list[Lines] = []
    for title, group in _panels(means, axes.get("panel")).items():
        curves = [_curve(method, axes["x"], own) for method, own in _by(group, "method").items()]
        curves = [curve for curve in curves if curve.y]
        if with_points and curves:
            curves += _published_curves(study)
        panels.append(Lines(title, axes["x_label"], axes["y_label"], tuple(curves)))
    drawn = tuple(panel for panel in panels if panel.curves)
    return _table(means, axes), Picture(_title(study), drawn) if drawn else None


def heat_maps(study: Study, grid: Grid, records: Sequence[Record]) -> tuple[Table, Picture | None]:
    """Return a heat map for each method over the options ``axes.x`` and ``axes.rows``.

    A method without these options, such as plain LoRA, is a reference in the titles.
    """
    axes = study.axes
    means = _means(grid, records, MEASURES[axes["y"]])
    references = [mean for mean in means if mean.option(axes["x"]) is None]
    named = "; ".join(f"{mean.option('method')} {mean.text}" for mean in references if mean.values)
    heats: list[Heat] = []
    for method, own in _by([mean for mean in means if mean not in references], "method").items():
        columns, rows = (sorted({float(mean.option(axes[name])) for mean in own}) for name in ("x", "rows"))
        found = {(float(m.option(axes["rows"])), float(m.option(axes["x"]))): m for m in own if m.values}
        heats.append(
            Heat(
                title=f"{method} ({named})" if named else method,
                x_label=axes["x_label"],
                y_label=axes["rows_label"],
                value_label=axes["y_label"],
                columns=tuple(f"{x:g}" for x in columns),
                rows=tuple(f"{y:g}" for y in rows),
                values=tuple(tuple(found[y, x].mean if (y, x) in found else None for x in columns) for y in rows),
                notes=tuple(tuple(found[y, x].note if (y, x) in found else "" for x in columns) for y in rows),
            )
        )
    drawn = any(heat.known for heat in heats)
    return _table(means, axes), Picture(_title(study), tuple(heats)) if drawn else None


def _means(grid: Grid, records: Sequence[Record], measure: Measure) -> list[_Mean]:
    known = by_key(records)
    found: list[_Mean] = []
    for row in grid.rows:
        rate = grid.rate(row, known)
        keys = [] if rate is None else [Point(row, rate, seed).key for seed in grid.seeds]
        records_of = [known[key] for key in keys if key in known]
        values = [measure(row, record) for record in records_of]
        failed = sum(record["status"] != "ok" for record in records_of)
        found.append(_Mean(row, tuple(value for value in values if value is not None), len(grid.seeds), failed))
    return found


def _by(means: Sequence[_Mean], option: str) -> dict[str, list[_Mean]]:
    groups: dict[str, list[_Mean]] = {}
    for mean in means:
        groups.setdefault(str(mean.option(option)), []).append(mean)
    return groups


def _panels(means: Sequence[_Mean], option: str | None) -> dict[str, list[_Mean]]:
    return _by(means, "task") if option is None else {f"{option}: {k}": v for k, v in _by(means, option).items()}


def _curve(method: str, x: str, means: Sequence[_Mean]) -> Curve:
    known = [mean for mean in means if mean.values and math.isfinite(mean.mean)]
    places = {float(mean.option(x)): mean for mean in known if mean.option(x) is not None}
    ordered = [places[place] for place in sorted(places)] or known[:1]
    return Curve(
        method, tuple(sorted(places)), tuple(mean.mean for mean in ordered), tuple(mean.error for mean in ordered)
    )


def _published_curves(study: Study) -> list[Curve]:
    curves: list[Curve] = []
    for point in study.published.points:
        curves.append(Curve(f"{point['series']}, paper", (point["x"],), (point["y"],), (0.0,), published=True))
    return curves


def _table(means: Sequence[_Mean], axes: Mapping[str, str]) -> Table:
    """A line a method, panel and row of a heat map; a column for each x."""
    x, rest = axes["x"], [axes[name] for name in ("panel", "rows") if name in axes]
    places = sorted({float(mean.option(x)) for mean in means if mean.option(x) is not None})
    cells: dict[str, dict[float | None, str]] = {}
    for mean in means:
        others = [f"{name} = {mean.option(name)}" for name in rest if mean.option(name) is not None]
        place = mean.option(x)
        line = cells.setdefault(", ".join([str(mean.option("method")), *others]), {})
        line[None if place is None else float(place)] = mean.text
    header = ("method", *(f"{x} = {place:g}" for place in places))
    if any(None in line for line in cells.values()):
        header, columns = (*header, f"no {x}"), [*places, None]
    else:
        columns = [*places]
    body = tuple((Cell(name), *(Cell(line.get(place, "")) for place in columns)) for name, line in cells.items())
    return Table(header, body, axes["y_label"])


def _title(study: Study) -> str:
    return f"{study.title} ({study.place})"
