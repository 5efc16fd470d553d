"""How alike the choices of a rule are over seeds, and what they are worth: from the records of finished runs.

    python benchmarks/choice/stability.py benchmarks/choice/beds.yaml#roget benchmarks/choice/stages.yaml#spread
    python benchmarks/choice/stability.py benchmarks/choice/beds.yaml#reviews benchmarks/choice/stages.yaml#screening \
        --head_learning_rate 1.5e-2 --against random0 random1 random2

Files and options are those that the benchmark was run with.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import spearmanr

from weightlora.bench.engine import recorded
from weightlora.bench.grid import Grid, Point, read_grid
from weightlora.bench.records import Record, by_key
from weightlora.bench.table import by_seed, differences, mean_and_error, require_rows
from weightlora.errors import OptionError
from weightlora.selection.steps import likeness


@dataclass(frozen=True)
class Choices:
    """The choices of a row at its best rate, and their losses."""

    label: str
    kept: tuple[frozenset[str], ...]
    """The kept sites of each seed, whatever their rank."""
    sites: int
    losses: Mapping[int, float]
    """By seed."""

    @property
    def jaccard(self) -> float:
        """Mean over all pairs of seeds: 1 where all keep the same sites."""
        return statistics.mean(likeness(dict.fromkeys(a, 1), dict.fromkeys(b, 1)) for a, b in self._pairs)

    @property
    def by_chance(self) -> float:
        """About that of random sets of as many sites."""
        shared = [len(a) * len(b) / self.sites for a, b in self._pairs]
        return statistics.mean(s / (len(a) + len(b) - s) for s, (a, b) in zip(shared, self._pairs, strict=True))

    @property
    def _pairs(self) -> list[tuple[frozenset[str], frozenset[str]]]:
        return list(itertools.combinations(self.kept, 2))


def main() -> None:
    """Print a line for each row that keeps some of the sites, the most stable first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="+", help="the files that the benchmark was run with")
    parser.add_argument("--against", nargs="+", metavar="ROW", default=["random0"], help="rows of random sites")
    asked, words = parser.parse_known_args()
    try:
        grid = read_grid(asked.config, words=words)
        require_rows(grid, asked.against)
    except OptionError as error:
        parser.error(str(error))
    found = choices(grid, recorded(grid))
    missing = {*asked.against} - {row.label for row in found}
    if missing:
        parser.error(
            f"--against {', '.join(sorted(missing))}: no two seeds in {grid.output_dir} that keep some of the sites"
        )
    print(table(found, asked.against))


def choices(grid: Grid, records: Sequence[Record]) -> list[Choices]:
    """Return the rows with runs of two seeds or more that keep some of the sites, the most stable first."""
    known = by_key(records)
    found: list[Choices] = []
    for row in grid.rows:
        losses = by_seed(grid, row, known)
        choice = grid.chosen(row, known)
        runs = [known[Point(row, choice, seed).key] for seed in losses if choice is not None]
        if len(runs) > 1 and all(run["adapters"] < run["sites"] for run in runs):
            kept = tuple(frozenset(run["kept"]) for run in runs)
            found.append(Choices(row.label, kept, runs[0]["sites"], losses))
    return sorted(found, key=lambda own: -own.jaccard)


def table(rows: Sequence[Choices], against: Sequence[str]) -> str:
    """Return a Markdown table, and whether stable rows are good; differences from random sites are paired by seed."""
    base = [row.losses for row in rows if row.label in against]
    gains = {row.label: differences(row.losses, base) for row in rows}
    lines = [
        "| sites | seeds | Jaccard over seeds | of random sets | minus random |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        gain = "" if row.label in against else mean_and_error(gains[row.label], lower=True, sign=True)
        lines.append(f"| {row.label} | {len(row.kept)} | {row.jaccard:.2f} | {row.by_chance:.2f} | {gain} |")
    chosen = [row for row in rows if row.label not in against and gains[row.label]]
    if len(chosen) > 2:
        found = spearmanr([row.jaccard for row in chosen], [statistics.mean(gains[row.label]) for row in chosen])
        lines += ["", f"Rank correlation of Jaccard and loss over {len(chosen)} rules: {found.statistic:+.2f}"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
