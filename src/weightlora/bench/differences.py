"""Records → a table of differences, paired by seed: what a row gains over others that saw the same data."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from weightlora.bench.grid import Grid, Point, Record, Row, by_key
from weightlora.bench.table import Cell, Table, mean_and_error
from weightlora.errors import OptionError


def make_differences(grid: Grid, records: Sequence[Record], against: Sequence[str]) -> Table:
    """Return the metrics of each row minus those of the rows ``against``, as mean ± standard error over the seeds.

    Runs of one seed share data, order and head, so their difference has less noise than either run.

    Args:
        grid: The benchmark.
        records: Whatever part of it has been run.
        against: Labels of rows; of several the mean is taken, seed by seed. Random rows are best compared with in this
            way: a single draw is no ruler.

    Raises:
        OptionError: There is no such row.
    """
    require_rows(grid, against)
    labels = list(dict.fromkeys(row.label for row in grid.rows))
    known = by_key(records)
    columns = list(dict.fromkeys((row.task, metric) for row in grid.rows for metric in row.metrics))
    rows = {(row.label, row.task): row for row in grid.rows}
    values = {(row.label, row.task, m): by_seed(grid, row, known, m) for row in grid.rows for m in row.metrics}
    body: list[tuple[Cell, ...]] = []
    for label in labels:
        cells = [Cell(label)]
        for task, metric in columns:
            found = differences(values[label, task, metric], [values[other, task, metric] for other in against])
            lower = rows[label, task].lower_is_better(metric)
            text = mean_and_error(found, lower=lower, sign=True) if found else "–"
            missing = f" ({len(found)} of {len(grid.seeds)} seeds)" if 0 < len(found) < len(grid.seeds) else ""
            cells.append(Cell(text + missing))
        body.append(tuple(cells))
    name = against[0] if len(against) == 1 else f"mean of {len(against)} rows"
    return Table((f"minus {name}", *map(" ".join, columns)), tuple(body))


def require_rows(grid: Grid, against: Sequence[str]) -> None:
    """Raise unless all of ``against`` are labels of rows.

    Raises:
        OptionError: With the one that is none.
    """
    labels = list(dict.fromkeys(row.label for row in grid.rows))
    for label in against:
        if label not in labels:
            raise OptionError(f"against={label!r} is no row; there are {', '.join(labels)}")


def by_seed(grid: Grid, row: Row, records: Mapping[str, Record], metric: str | None = None) -> dict[int, float]:
    """Return a metric of a row's runs at its chosen rate, by seed; failed and missing runs have none.

    Args:
        grid: The benchmark.
        row: One of its rows.
        records: By the key of their run.
        metric: One of the row's ``metrics``; None: the first.
    """
    rate = grid.rate(row, records)
    found = {seed: records.get(Point(row, rate, seed).key) for seed in grid.seeds} if rate is not None else {}
    values = {seed: row.tested(record, metric) for seed, record in found.items() if record is not None}
    return {seed: value for seed, value in values.items() if value is not None}


def differences(own: Mapping[int, float], others: Sequence[Mapping[int, float]]) -> list[float]:
    """Return own value − mean of the others for each seed that all of them have.

    Example:
        >>> differences({0: 0.9, 1: 0.7}, [{0: 0.5, 1: 0.6}, {0: 0.7}])
        [0.30000000000000004]
    """
    seeds = [seed for seed in sorted(own) if all(seed in other for other in others)]
    return [own[seed] - statistics.mean(other[seed] for other in others) for seed in seeds]
