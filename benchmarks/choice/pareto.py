"""What whole sites save: held-out loss against the time of a training and the bytes saved for the backward pass.

    weightlora bench --config benchmarks/choice/roget.yaml benchmarks/choice/pareto.yaml
    python benchmarks/choice/pareto.py benchmarks/choice/roget.yaml benchmarks/choice/pareto.yaml --picture pareto.png

Times of the training are step time, interleaved with plain LoRA's, times the number of steps, without the selection.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from weightlora.bench.differences import differences
from weightlora.bench.engine import recorded
from weightlora.bench.grid import Grid, Point, Record, by_key, read_grid
from weightlora.paper.picture import Curve, Lines, Picture, draw


@dataclass(frozen=True)
class Measured:
    """The runs of a row at its best rate."""

    label: str
    losses: dict[int, float]
    """By seed."""
    step: float
    """Time of a step, relative to plain LoRA of the same rank on all sites."""
    steps: int
    selection: float
    """Time of the selection, as a share of the training's."""
    saved: float
    """Megabytes saved for the backward pass."""

    @property
    def loss(self) -> float:
        """Mean over the seeds."""
        return statistics.mean(self.losses.values())


def main() -> None:
    """Print the table, and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="+", help="the files that the benchmark was run with")
    parser.add_argument("--picture", type=Path, help="PNG, PDF or SVG")
    asked = parser.parse_args()
    grid = read_grid(asked.config)
    rows = measured(grid, recorded(grid))
    print(table(rows, grid.reference))
    if asked.picture is not None:
        draw(picture(rows, grid.reference), asked.picture)


def measured(grid: Grid, records: Sequence[Record]) -> list[Measured]:
    """Return all rows that have been run."""
    known = by_key(records)
    found: list[Measured] = []
    for row in grid.rows:
        rate = grid.rate(row, known)
        runs = {} if rate is None else {seed: known.get(Point(row, rate, seed).key) for seed in grid.seeds}
        good = {seed: run for seed, run in runs.items() if run is not None and run["status"] == "ok"}
        if good:
            losses = {seed: loss for seed, run in good.items() if (loss := row.tested(run)) is not None}
            runs_of = list(good.values())
            step, saved = (statistics.median(run[name] for run in runs_of) for name in ("step_ratio", "saved_bytes"))
            selection = statistics.median(run["selection_seconds"] / run["training_seconds"] for run in runs_of)
            found.append(Measured(row.label, losses, step, runs_of[0]["steps"], selection, saved / 1e6))
    return found


def times(rows: Sequence[Measured], reference: str) -> dict[str, tuple[float, float]]:
    """Return the time of each row's training, and that with the selection; the training of ``reference`` takes 1."""
    one = next(row.step * row.steps for row in rows if row.label == reference)
    training = {row.label: row.step * row.steps / one for row in rows}
    return {row.label: (training[row.label], training[row.label] * (1 + row.selection)) for row in rows}


def table(rows: Sequence[Measured], reference: str) -> str:
    """Return a Markdown table; rows on the front are beaten by no row that takes as little time with its selection."""
    taken = times(rows, reference)
    base = next(row.losses for row in rows if row.label == reference)
    lines = [
        "| row | loss | minus the reference | step | training | with selection | saved, MB | |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        training, whole = taken[row.label]
        gain = _with_error(differences(row.losses, [base]), "+.3f")
        front = "" if any(other.loss < row.loss and taken[other.label][1] <= whole for other in rows) else "front"
        numbers = f"{row.step:.2f} | {training:.2f} | {whole:.2f} | {row.saved:.1f} | {front}"
        lines.append(f"| {row.label} | {_with_error(list(row.losses.values()), '.3f')} | {gain} | {numbers} |")
    return "\n".join(lines)


def picture(rows: Sequence[Measured], reference: str) -> Picture:
    """Return loss over time, the selection included: a curve for each method, whose points are its rows."""
    taken = times(rows, reference)
    curves: list[Curve] = []
    for method in dict.fromkeys(row.label.split(",")[0] for row in rows):
        own = sorted((r for r in rows if r.label.split(",")[0] == method), key=lambda row: taken[row.label][1])
        errors = tuple(_error(list(row.losses.values())) for row in own)
        curves.append(Curve(method, tuple(taken[r.label][1] for r in own), tuple(r.loss for r in own), errors))
    x_label = f"time of selection and training, {reference} = 1"
    return Picture("What whole sites save", (Lines("", x_label, "held-out loss", tuple(curves), few_ticks=False),))


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _with_error(values: Sequence[float], form: str) -> str:
    return f"{statistics.mean(values):{form}} ± {_error(values):.3f}"


if __name__ == "__main__":
    main()
