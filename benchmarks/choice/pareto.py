"""What whole sites save: held-out loss against the time of a training and the bytes saved for the backward pass.

    weightlora bench --config benchmarks/choice/roget.yaml benchmarks/choice/pareto.yaml
    python benchmarks/choice/pareto.py roget [--picture docs/lab/pareto.png]

Times are those of all steps without the selection: step time, interleaved with plain LoRA's, times the number of steps.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from weightlora.bench.differences import differences
from weightlora.bench.engine import recorded
from weightlora.bench.grid import Grid, Point, by_key, read_grid
from weightlora.paper.picture import Curve, Lines, Picture, draw

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Measured:
    """The runs of a row at its best rate."""

    label: str
    losses: dict[int, float]
    """By seed."""
    step: float
    """Time of a step, relative to plain LoRA of the same rank on all sites."""
    steps: int
    saved: float
    """Megabytes saved for the backward pass."""

    @property
    def loss(self) -> float:
        """Mean over the seeds."""
        return statistics.mean(self.losses.values())


def main() -> None:
    """Print the table of a bed, and draw its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bed", choices=["roget", "reviews"])
    parser.add_argument("--picture", type=Path, help="PNG, PDF or SVG")
    asked = parser.parse_args()
    grid = read_grid([HERE / f"{asked.bed}.yaml", HERE / "pareto.yaml"])
    rows = measured(grid)
    reference = next(row for row in rows if row.label == grid.reference)
    times = {row.label: row.step * row.steps / (reference.step * reference.steps) for row in rows}
    print("| row | loss | minus LoRA | step | training | saved, MB | |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for row in rows:
        gain = _with_error(differences(row.losses, [reference.losses]), "+.3f")
        beaten = any(other.loss < row.loss and times[other.label] <= times[row.label] for other in rows)
        numbers = f"{row.step:.2f} | {times[row.label]:.2f} | {row.saved:.1f} | {'' if beaten else 'front'}"
        print(f"| {row.label} | {_with_error(list(row.losses.values()), '.3f')} | {gain} | {numbers} |")
    if asked.picture is not None:
        draw(picture(rows, times), asked.picture)


def measured(grid: Grid) -> list[Measured]:
    """Return all rows that have been run."""
    known = by_key(recorded(grid))
    found: list[Measured] = []
    for row in grid.rows:
        rate = grid.rate(row, known)
        runs = {} if rate is None else {seed: known.get(Point(row, rate, seed).key) for seed in grid.seeds}
        good = {seed: run for seed, run in runs.items() if run is not None and run["status"] == "ok"}
        if good:
            step, saved = (
                statistics.median(run[name] for run in good.values()) for name in ("step_ratio", "saved_bytes")
            )
            losses = {seed: loss for seed, run in good.items() if (loss := row.tested(run)) is not None}
            found.append(Measured(row.label, losses, step, next(iter(good.values()))["steps"], saved / 1e6))
    return found


def picture(rows: Sequence[Measured], times: dict[str, float]) -> Picture:
    """Return loss over time: a curve for each method, whose points are its rows."""
    curves: list[Curve] = []
    for method in dict.fromkeys(row.label.split(",")[0] for row in rows):
        own = sorted((row for row in rows if row.label.split(",")[0] == method), key=lambda row: times[row.label])
        x = tuple(round(times[row.label], 2) for row in own)
        errors = tuple(_error(list(row.losses.values())) for row in own)
        curves.append(Curve(method, x, tuple(row.loss for row in own), errors))
    panel = Lines("", "time of the training, LoRA of rank 2 on all sites = 1", "held-out loss", tuple(curves))
    return Picture("What whole sites save", (panel,))


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _with_error(values: Sequence[float], form: str) -> str:
    return f"{statistics.mean(values):{form}} ± {_error(values):.3f}"


if __name__ == "__main__":
    main()
