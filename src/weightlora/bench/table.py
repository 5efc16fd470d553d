"""Records → a table for terminal, Markdown and LaTeX: mean ± standard error, best in bold, second underlined."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from weightlora.bench.grid import Grid, Point, Row, choice_text, parts_of
from weightlora.bench.records import Record, by_key, differing, mixed
from weightlora.errors import OptionError
from weightlora.methods import entry_of
from weightlora.text import in_latex, in_markdown, one_line, printable

if TYPE_CHECKING:
    from rich.table import Table as RichTable

#: From here on a number is written with an exponent: a loss that diverged.
_MOST = 1e6


@dataclass(frozen=True)
class Cell:
    """A text, and whether it is the best (1) or second (2) of its column."""

    text: str
    place: int = 0


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header; the first column names the method."""

    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    """What must be known of where the numbers come from."""


@dataclass(frozen=True)
class _Line:
    """The runs of a row on one task that its numbers come from."""

    row: Row
    choice: Mapping[str, Any] | None
    records: tuple[Record, ...]
    wanted: int

    @property
    def good(self) -> list[Record]:
        return [record for record in self.records if record["status"] == "ok"]

    def values(self, metric: str) -> list[float]:
        return [value for record in self.records if (value := self.row.tested(record, metric)) is not None]

    def sums(self, *names: str) -> list[float]:
        """The sum of these entries of each run that has them."""
        return [sum(r[name] for name in names) for r in self.good if all(r.get(n) is not None for n in names)]


def make_table(grid: Grid, records: Sequence[Record]) -> Table:
    """Return the table of a benchmark, whatever part of it has been run.

    Metrics are those of the runs at the chosen learning rate: shares in per cent, losses as they are. Where GLUE has
    two, both are shown and their mean counts. The average over tasks is that of the metric, without what only chooses
    the rate. Parameters are
    those of the adapters, at their peak, the selection included, and as exported, means over the runs; full
    fine-tuning, whose export holds identities, has its peak in both. Times are
    medians over the runs, relative to ``grid.reference``: the time of a step, interleaved with plain LoRA's, and of
    selection and training together.
    """
    known = by_key(records)
    tasks = list(dict.fromkeys(row.task for row in grid.rows))
    labels = list(dict.fromkeys(row.label for row in grid.rows))
    lines = {(row.label, row.task): _line(grid, row, known) for row in grid.rows}
    metrics = {row.task: row.metrics for row in grid.rows}
    columns = [(task, metric) for task in tasks for metric in metrics[task]]
    scores = [_column([lines[label, task] for label in labels], metric) for task, metric in columns]
    header = ("method", "rate", "peak", "exported", *(" ".join(column) for column in columns))
    if len(tasks) > 1:
        header = (*header, "average")
        averages = _averages([[lines[label, task] for task in tasks] for label in labels])
    else:
        averages = []
    body: list[tuple[Cell, ...]] = []
    for i, label in enumerate(labels):
        own = [lines[label, task] for task in tasks]
        rates = " ".join(dict.fromkeys("–" if line.choice is None else choice_text(line.choice) for line in own))
        within = entry_of(own[0].row.options["method"]).keeps_budget
        counts = [_count(own, name) for name in (_PEAK, "adapter_parameters" if within else _PEAK)]
        times = [_ratio(own, [lines[grid.reference, task] for task in tasks], names) for names in _TIMES]
        cells = [Cell(text) for text in (label, rates, *counts)]
        cells += [column[i] for column in scores] + averages[i : i + 1] + [Cell(text) for text in times]
        body.append(tuple(cells))
    return Table((*header, "step", "whole"), tuple(body), _caption(lines.values()))


_PEAK = "peak_parameters"
_TIMES = (("step_ratio",), ("selection_seconds", "training_seconds"))


def to_markdown(table: Table) -> str:
    """Return the table as Markdown, bold and underlined as in the paper."""
    marks = ("{}", "**{}**", "<u>{}</u>")
    head = list(map(in_markdown, table.header))
    rows = [[marks[cell.place].format(in_markdown(cell.text)) for cell in row] for row in table.rows]
    rules = ["---", *("---:" for _ in table.header[1:])]
    caption = f"\n{in_markdown(table.caption)}\n" if table.caption else ""
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rules, *rows)) + caption


def to_latex(table: Table) -> str:
    r"""Return the table as a LaTeX ``tabular`` with booktabs rules.

    Example:
        >>> print(to_latex(Table(("method", "rte"), ((Cell("lora_drop"), Cell("70.1 ± 0.2", 1)),))))
        \begin{tabular}{lr}
        \toprule
        method & rte \\
        \midrule
        lora\_drop & \textbf{70.1 $\pm$ 0.2} \\
        \bottomrule
        \end{tabular}
        <BLANKLINE>
    """
    marks = ("{}", r"\textbf{{{}}}", r"\underline{{{}}}")
    rows = [[marks[cell.place].format(in_latex(cell.text)) for cell in row] for row in table.rows]
    head = " & ".join(map(in_latex, table.header)) + r" \\"
    body = [" & ".join(row) + r" \\" for row in rows]
    columns = "l" + "r" * (len(table.header) - 1)
    lines = [
        *([f"% {one_line(table.caption)}"] if table.caption else []),
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def to_terminal(table: Table) -> RichTable:
    """Return the table as rich prints it."""
    from rich.box import SIMPLE
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(box=SIMPLE, padding=(0, 1, 0, 0), caption=table.caption or None)
    for i, name in enumerate(table.header):
        shown.add_column(name, justify="right" if i else "left")
    styles = ("", "bold", "underline")
    for row in table.rows:
        shown.add_row(*(Text(printable(cell.text), style=styles[cell.place]) for cell in row))
    return shown


def parts_that_fit(table: Table, width: int) -> list[Table]:
    """Return the table as one or more that fit into ``width`` characters: columns side by side, the first in each.

    Example:
        >>> wide = Table(("method", "rte", "mrpc"), ((Cell("lora"), Cell("70.1 ± 0.2"), Cell("88.0 ± 0.1")),))
        >>> [part.header for part in parts_that_fit(wide, 24)]
        [('method', 'rte'), ('method', 'mrpc')]
    """
    sizes = [
        2 + max(len(text) for text in (name, *(row[i].text for row in table.rows)))
        for i, name in enumerate(table.header)
    ]
    groups: list[list[int]] = [[0]]
    for column in range(1, len(sizes)):
        if len(groups[-1]) > 1 and sum(sizes[i] for i in groups[-1]) + sizes[column] > width:
            groups.append([0])
        groups[-1].append(column)
    parts = [
        Table(tuple(table.header[i] for i in group), tuple(tuple(row[i] for i in group) for row in table.rows))
        for group in groups
    ]
    return [*parts[:-1], replace(parts[-1], caption=table.caption)]


def _caption(lines: Iterable[_Line]) -> str:
    """Say so where the numbers come from different revisions or versions."""
    differences = differing(record for line in lines for record in line.records)
    return f"Records of different sources: {mixed(differences)}." if differences else ""


def _line(grid: Grid, row: Row, known: Mapping[str, Record]) -> _Line:
    choice = grid.chosen(row, known)
    if choice is None:  # all of its tuning failed, or it has not been run
        points = [point for point in grid.tuning if point.row is row]
    else:
        points = [Point(row, choice, seed) for seed in grid.seeds]
    found = [known[point.key] for point in points if point.key in known]
    return _Line(row, choice, tuple(found) if choice is not None or not _any_good(found) else (), len(grid.seeds))


def _any_good(records: Sequence[Record]) -> bool:
    return any(record["status"] == "ok" for record in records)


def _column(lines: Sequence[_Line], metric: str) -> list[Cell]:
    values = [line.values(metric) for line in lines]
    lower = lines[0].row.lower_is_better(metric)
    places = _places([statistics.mean(own) if own else None for own in values], lower=lower)
    return [Cell(_spread(line, metric), place) for line, place in zip(lines, places, strict=True)]


def _spread(line: _Line, metric: str) -> str:
    """Mean ± standard error, of each part of the metric; how many runs it is of, where some are missing."""
    failed, values = len(line.records) - len(line.good), line.values(metric)
    if not values:
        return "failed" if failed else "–"
    lower = line.row.lower_is_better(metric)
    mean = "/".join(mean_and_error(line.values(part), lower=lower) for part in parts_of(metric))
    return mean if len(values) == line.wanted else f"{mean} ({runs_behind(len(values), line.wanted, failed)})"


def runs_behind(count: int, wanted: int, failed: int) -> str:
    """Return how many runs a mean is of, in words.

    Example:
        >>> runs_behind(3, 5, 1)
        '3 of 5 runs, 1 failed'
    """
    return f"{count} of {wanted} runs" + (f", {failed} failed" if failed else "")


def mean_and_error(values: Sequence[float], *, lower: bool, sign: bool = False) -> str:
    """Return ``mean ± standard error``: a share in per cent, a loss as it is.

    Args:
        values: At least one; of one there is no error.
        lower: Whether they are losses.
        sign: Write a plus in front of a positive mean.

    Example:
        >>> mean_and_error([0.5, 0.6], lower=False), mean_and_error([0.5, 0.6], lower=True, sign=True)
        ('55.0 ± 5.0', '+0.550 ± 0.050')
    """
    scale, digits = (1, 3) if lower else (100, 1)
    mean, error = scale * statistics.mean(values), scale * standard_error(values)
    text = _number(mean, digits, "+" if sign else "")
    return text if len(values) == 1 or math.isnan(error) else f"{text} ± {_number(error, digits)}"


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of a mean: 0 of one value, NaN where a value is infinite or none.

    Example:
        >>> standard_error([0.25, 0.75]), standard_error([0.5]), standard_error([0.5, float("inf")])
        (0.25, 0.0, nan)
    """
    if not all(map(math.isfinite, values)):
        return math.nan
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _number(value: float, digits: int, sign: str = "") -> str:
    if math.isnan(value):
        return "nan"  # without a sign
    return f"{value:{sign}.{digits}f}" if abs(value) < _MOST else f"{value:{sign}.3g}"


def _averages(groups: Sequence[Sequence[_Line]]) -> list[Cell]:
    """Mean over the tasks, of rows that have numbers on all of them."""
    values = [[line.values(line.row.metric) for line in group] for group in groups]
    means = [statistics.mean(map(statistics.mean, own)) if all(own) else None for own in values]
    lower = all(line.row.lower_is_better(line.row.metric) for group in groups for line in group)
    places = _places(means, lower=lower)
    texts = ["–" if mean is None else mean_and_error([mean], lower=lower) for mean in means]
    return [Cell(text, place) for text, place in zip(texts, places, strict=True)]


def _places(means: Sequence[float | None], *, lower: bool = False) -> list[int]:
    """1 for the best, 2 for the next value, 0 for the others; equal ones share a place, NaN and infinity have none."""
    best = sorted({mean for mean in means if mean is not None and math.isfinite(mean)}, reverse=not lower)[:2]
    return [1 + best.index(mean) if mean in best else 0 for mean in means]


def _count(lines: Sequence[_Line], name: str) -> str:
    means = [statistics.mean(counts) for line in lines if (counts := line.sums(name))]
    return f"{round(statistics.mean(means)):,}" if means else "–"


def _ratio(lines: Sequence[_Line], reference: Sequence[_Line], names: Sequence[str]) -> str:
    """Time ÷ that of the reference, the mean over the tasks where both are known."""
    pairs = [(line.sums(*names), other.sums(*names)) for line, other in zip(lines, reference, strict=True)]
    ratios = [statistics.median(own) / statistics.median(other) for own, other in pairs if own and other]
    return f"{statistics.mean(ratios):.2f}" if ratios else "–"


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
    choice = grid.chosen(row, records)
    found = {seed: records.get(Point(row, choice, seed).key) for seed in grid.seeds} if choice is not None else {}
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
