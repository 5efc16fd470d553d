"""What whole sites save: held-out loss against the time of a training and the bytes saved for the backward pass.

    weightlora bench --config benchmarks/choice/beds.yaml#roget benchmarks/choice/stages.yaml#pareto
    python benchmarks/choice/pareto.py benchmarks/choice/beds.yaml#roget benchmarks/choice/stages.yaml#pareto \
        --picture pareto.png

Times of the training are step time, interleaved with that of plain LoRA of the same rank, times the number of steps.
How much longer a step of plain LoRA takes at another rank is not in the table; --ranks measures it:

    python benchmarks/choice/pareto.py benchmarks/choice/beds.yaml#roget benchmarks/choice/stages.yaml#pareto \
        --ranks 2 10
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from weightlora.bench.engine import recorded
from weightlora.bench.grid import Grid, Point, read_grid
from weightlora.bench.records import Record, by_key
from weightlora.bench.table import differences, mean_and_error
from weightlora.cost.step_time import step_ratios
from weightlora.paper.picture import Curve, Lines, Picture, draw
from weightlora.runs.recipe import option_words, read_recipe
from weightlora.runs.train import prepare

#: Steps that are timed for each rank.
ROUNDS = 30


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
    parser.add_argument("--ranks", type=int, nargs="+", metavar="R", help="time a step of plain LoRA of these ranks")
    asked = parser.parse_args()
    grid = read_grid(asked.config)
    if asked.ranks:
        print({rank: round(ratio, 3) for rank, ratio in rank_ratios(grid, asked.ranks).items()})
        return
    rows = measured(grid, recorded(grid))
    if grid.reference not in {row.label for row in rows}:
        parser.error(f"no run of {grid.reference!r} in {grid.output_dir} was timed; set timing_rounds and run it")
    print(table(rows, grid.reference))
    if asked.picture is not None:
        draw(picture(rows, grid.reference), asked.picture)


def measured(grid: Grid, records: Sequence[Record]) -> list[Measured]:
    """Return all rows that have been run, and whose steps were timed."""
    known = by_key(records)
    found: list[Measured] = []
    for row in grid.rows:
        choice = grid.chosen(row, known)
        runs = {} if choice is None else {seed: known.get(Point(row, choice, seed).key) for seed in grid.seeds}
        good = {seed: run for seed, run in runs.items() if run is not None and "step_ratio" in run}
        if good:
            losses = {seed: loss for seed, run in good.items() if (loss := row.tested(run)) is not None}
            runs_of = list(good.values())
            step, saved = (statistics.median(run[name] for run in runs_of) for name in ("step_ratio", "saved_bytes"))
            selection = statistics.median(run["selection_seconds"] / run["training_seconds"] for run in runs_of)
            found.append(Measured(row.label, losses, step, runs_of[0]["steps"], selection, saved / 1e6))
    return found


def rank_ratios(grid: Grid, ranks: Sequence[int]) -> dict[str, float]:
    """Return the time of a step of plain LoRA on all sites at each rank ÷ that at the first."""
    reference = next(row for row in grid.rows if row.label == grid.reference)
    stock = {**reference.options, "fast": None, **reference.choices[0]}
    with TemporaryDirectory() as scratch:
        words = {rank: option_words({**stock, "lora_r": rank, "lora_alpha": 2 * rank}) for rank in ranks}
        trainers = {
            r: prepare(read_recipe(words=w, output_dir=scratch), measured=False).trainer for r, w in words.items()
        }
    models: dict[str, Any] = {str(rank): trainer.model for rank, trainer in trainers.items()}
    return step_ratios(models, next(iter(trainers[ranks[0]].get_train_dataloader())), rounds=ROUNDS)


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
        loss = mean_and_error(list(row.losses.values()), lower=True)
        gain = mean_and_error(differences(row.losses, [base]), lower=True, sign=True)
        front = "" if any(other.loss < row.loss and taken[other.label][1] <= whole for other in rows) else "front"
        numbers = f"{row.step:.2f} | {training:.2f} | {whole:.2f} | {row.saved:.1f} | {front}"
        lines.append(f"| {row.label} | {loss} | {gain} | {numbers} |")
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


if __name__ == "__main__":
    main()
