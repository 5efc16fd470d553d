"""A study and its records → a table, a figure, and what must be said of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from weightlora.bench.grid import Grid, Point, Row
from weightlora.bench.records import Record, by_key
from weightlora.bench.table import Cell, Table, make_table, runs_behind, standard_error
from weightlora.paper.picture import Curve, Heat, Lines, Picture
from weightlora.paper.study import Published, Study
from weightlora.plan.limits import LIMITS
from weightlora.runs.gradient_study import Overlap


@dataclass(frozen=True)
class Results:
    """What is drawn of a study."""

    table: Table
    picture: Picture | None
    """None of a table of the paper, and where there is no record to draw."""
    notes: tuple[str, ...]
    """Where it is in the paper, what the paper says, and what differs here."""

    @property
    def captioned(self) -> Table:
        """The table with all that must be said, for a file."""
        own = f"{self.table.caption.rstrip('.')}." if self.table.caption else ""
        return replace(self.table, caption=" ".join(filter(None, (own, *self.notes))))


def results_of(study: Study, size: str, grid: Grid, records: Sequence[Record]) -> Results:
    """Return the table and figure of a study that trains.

    Args:
        study: A table, curves, heat maps or Jaccard matrices.
        size: Of its set-up.
        grid: Its benchmark.
        records: What there is of it; others are passed over.
    """
    picture: Picture | None = None
    if study.kind == "table":
        table = with_published(make_table(grid, records), study.published)
    elif study.kind == "lines":
        table, picture = lines(study, grid, records, with_points=size == "full")
    elif study.kind == "heat_map":
        table, picture = heat_maps(study, grid, records)
    else:
        table, picture = stability(study, grid, records)
    return Results(table, picture, notes_of(study, size))


def computed_results(study: Study, size: str) -> Results:
    """Return the table and figure of a study that is computed and trains nothing."""
    from weightlora.paper.tables import computed_memory  # loads transformers' models

    return Results(*computed_memory(study, size), notes_of(study, size))


def notes_of(study: Study, size: str) -> tuple[str, ...]:
    """Return where the study is in the paper, what the paper says, and what differs here."""
    published = study.published
    return (
        f"{study.title}: {study.place} of the paper, {size} size.",
        *([_IN_BRACKETS] if published.rows else []),
        *(f"The paper: {statement}." for statement in published.statements),
        f"What differs: {study.setup(size).differs}.",
    )


_AVERAGE = "average"
_IN_BRACKETS = "In brackets, or in a column of its own: the paper's values, in per cent, and its parameters."


def with_published(table: Table, published: Published) -> Table:
    """Return the table with the paper's value behind ours: the parameters, and the tasks that the paper has too.

    Where it has none of them, its average over its own tasks is one more column; without an average, each of them is.

    Args:
        table: Of a benchmark; its first column has the labels of the rows.
        published: The paper's values.
    """
    table = _with_parameters(table, published.parameters)
    # A loss is no column of the paper's: it is what the rates are chosen by.
    names = ["" if header.endswith(" loss") else header.split()[0] for header in table.header]
    shared = [name for name in names if name in published.columns and name != _AVERAGE]
    if not shared:
        return _beside(table, published)
    columns = {*shared, *([_AVERAGE] if {*published.columns} - {_AVERAGE} == {*shared} else ())}
    header = tuple(
        f"{text} (paper)" if name in columns else text for name, text in zip(names, table.header, strict=True)
    )
    rows = tuple(
        tuple(
            _behind(cell, published.text(row[0].text, name)) if name in columns else cell
            for name, cell in zip(names, row, strict=True)
        )
        for row in table.rows
    )
    return replace(table, header=header, rows=rows)


def _with_parameters(table: Table, parameters: Mapping[str, str]) -> Table:
    """The paper's column "# Params": what is exported, and in brackets what the paper has."""
    if _EXPORTED not in table.header:
        return table
    place = table.header.index(_EXPORTED)
    header = (*table.header[:place], "# Params (paper)" if parameters else "# Params", *table.header[place + 1 :])
    rows = tuple(
        (*row[:place], _behind(row[place], parameters.get(row[0].text, "")), *row[place + 1 :]) for row in table.rows
    )
    return replace(table, header=header, rows=rows)


_EXPORTED = "exported"


def _beside(table: Table, published: Published) -> Table:
    """The table with the paper's average in a further column, or all of its columns where it has none."""
    tasks = [column for column in published.columns if column != _AVERAGE]
    names = {task: f"paper, {task}" for task in tasks}
    if _AVERAGE in published.columns:
        names = {_AVERAGE: f"paper, average of {len(tasks)} tasks"}
    rows = tuple((*row, *(Cell(published.text(row[0].text, column) or "–") for column in names)) for row in table.rows)
    return replace(table, header=(*table.header, *names.values()), rows=rows)


def _behind(cell: Cell, value: str) -> Cell:
    return Cell(f"{cell.text} ({value})", cell.place) if value else cell


def jaccard(one: Collection[str], other: Collection[str]) -> float:
    """Return |A∩B| / |A∪B|; two empty sets are alike.

    Example:
        >>> jaccard("abcdefghij", "abcdefghik")  # one of ten differs: 9 / 11, the paper's 0.82
        0.8181818181818182
    """
    either = {*one} | {*other}
    return len({*one} & {*other}) / len(either) if either else 1.0


def stability(study: Study, grid: Grid, records: Sequence[Record]) -> tuple[Table, Picture | None]:
    """Return a matrix over the seeds for each row, and a table of its means and least values."""
    known = by_key(records)
    header = ("choice", "adapters", "runs", "mean", "least", "equal pairs", "at random")
    body: list[tuple[Cell, ...]] = []
    heats: list[Heat] = []
    for row in grid.rows:
        points = [Point(row, row.choices[0], seed) for seed in grid.seeds]
        found = [known[point.key] for point in points if point.key in known and "kept" in known[point.key]]
        kept = [record["kept"] for record in found]
        pairs = [jaccard(one, other) for one, other in combinations(kept, 2)]
        if not pairs:
            body.append(tuple(map(Cell, (row.label, "–", str(len(kept)), "–", "–", "–", "–"))))
            continue
        size = round(statistics.mean(map(len, kept)))
        chance = Overlap(found[0]["sites"], size, 0).jaccard_by_chance
        equal = f"{sum(pair == 1 for pair in pairs)} of {len(pairs)}"
        numbers = (f"{statistics.mean(pairs):.2f}", f"{min(pairs):.2f}", equal, f"{chance:.2f}")
        body.append(tuple(map(Cell, (row.label, str(size), str(len(kept)), *numbers))))
        seeds = tuple(str(record["options"]["seed"]) for record in found)
        matrix = tuple(tuple(jaccard(one, other) for other in kept) for one in kept)
        heats.append(Heat(row.label, "seed", "seed", "Jaccard similarity", seeds, seeds, matrix, (0, 1)))
    picture = Picture(f"{study.title} ({study.place})", tuple(heats)) if heats else None
    return Table(header, tuple(body), "Jaccard similarity of the kept adapters of two seeds"), picture


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
        choice = grid.chosen(row, known)
        keys = [] if choice is None else [Point(row, choice, seed).key for seed in grid.seeds]
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
        header, columns = (*header, "no limit" if x in LIMITS else f"no {x}"), [*places, None]
    else:
        columns = [*places]
    body = tuple((Cell(name), *(Cell(line.get(place, "")) for place in columns)) for name, line in cells.items())
    return Table(header, body, axes["y_label"])


def _title(study: Study) -> str:
    return f"{study.title} ({study.place})"
