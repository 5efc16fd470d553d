"""Three tables of finished runs: losses at each alpha, default answers beside trivial ones, and stability over seeds.

    weightlora bench --config benchmarks/choice/beds.yaml#roget benchmarks/choice/stages.yaml#alpha --learning_rate 2e-3
    python benchmarks/choice/tables.py alpha benchmarks/choice/beds.yaml#roget benchmarks/choice/stages.yaml#alpha

*alpha*: loss of each rank, rule of alpha and rate that has a record. The last column is the loss minus that of the same
rank at its own best rate with alpha/r fixed, paired by seed.

    weightlora bench --config benchmarks/choice/beds.yaml#roget benchmarks/choice/stages.yaml#dominance
    python benchmarks/choice/tables.py dominance benchmarks/choice/beds.yaml#roget \
        benchmarks/choice/stages.yaml#dominance

*dominance*: a line for each default answer of ``PAIRS``: loss minus that of the trivial alternative of the same cost at
each one's best rate, paired by seed. *dominated* is a loss that is more than one standard error above.

    python benchmarks/choice/tables.py stability benchmarks/choice/beds.yaml#reviews \
        benchmarks/choice/stages.yaml#screening --head_learning_rate 1.5e-2 --against random0 random1 random2

*stability*: how alike the choices of a rule are over seeds, and what they are worth. Files and options are those that
the benchmark was run with.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import spearmanr

from weightlora.bench.engine import recorded
from weightlora.bench.grid import Grid, Point, Row, choice_text, read_grid
from weightlora.bench.records import Record, by_key
from weightlora.bench.table import by_seed, differences, mean_and_error, require_rows, standard_error
from weightlora.errors import OptionError
from weightlora.selection.steps import likeness

#: Losses by seed, by rate.
Rates = Mapping[float, Mapping[int, float]]
#: The default answer, and what needs no selection at the same cost.
PAIRS = (
    ("parameters 0.5", "LoRA, rank 5"),
    ("parameters 0.25", "LoRA, rank 2"),
    ("0.25, alpha by site", "LoRA, rank 2"),
    ("parameters 0.1", "LoRA, rank 1"),
    ("parameters 0.05", "random sites, 0.05"),
    ("parameters 0.05", "uppermost sites, 0.05"),
    ("first_order, memory 115MB", "LoRA, micro-batches of 8"),
    ("first_order, memory 115MB", "LoRA, micro-batches of 8, 0.7 of the steps"),
    ("time 0.8", "LoRA, 0.83 of the steps"),
    ("time 0.6", "LoRA, 0.63 of the steps"),
    ("time 0.6, parameters 0.25", "LoRA, rank 2, 0.63 of the steps"),
)


def main() -> None:
    """Print one of the tables."""
    tables = {"alpha": alpha, "dominance": dominance}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=(*tables, "stability"))
    parser.add_argument("config", type=Path, nargs="+", help="the files that the benchmark was run with")
    parser.add_argument("--against", nargs="+", metavar="ROW", default=["random0"], help="stability: random sites")
    asked, words = parser.parse_known_args()
    try:
        grid = read_grid(asked.config, words=words)
        if asked.table in tables:
            print(tables[asked.table](grid, recorded(grid)))
            return
        require_rows(grid, asked.against)
    except OptionError as error:
        parser.error(str(error))
    found = choices(grid, recorded(grid))
    missing = {*asked.against} - {row.label for row in found}
    if missing:
        parser.error(
            f"--against {', '.join(sorted(missing))}: no two seeds in {grid.output_dir} that keep some of the sites"
        )
    print(stability(found, asked.against))


def alpha(grid: Grid, records: Sequence[Record]) -> str:
    """Return a Markdown table: a line for each row and rate."""
    lines = ["| row | rate | loss | minus the rank's own best | seeds |", "| --- | ---: | ---: | ---: | ---: |"]
    known = {row.label: rates_of(row, records) for row in grid.rows}
    for row in grid.rows:
        ratio = known.get(f"{row.label.split(',')[0]}, ratio") or known[row.label]
        for rate, losses in sorted(known[row.label].items()):
            best = best_rate(ratio, [*losses])
            gap = "" if best is None else mean_and_error(differences(losses, [ratio[best]]), lower=True, sign=True)
            loss = mean_and_error([*losses.values()], lower=True)
            lines.append(f"| {row.label} | {rate:g} | {loss} | {gap} | {len(losses)} |")
    return "\n".join(lines)


def rates_of(row: Row, records: Sequence[Record]) -> Rates:
    """Return the losses of a row's runs, at any rate and seed."""
    free = ("learning_rate", "seed")
    wanted = _text({k: v for k, v in Point(row, {"learning_rate": 1.0}, 0).options.items() if k not in free})
    found: dict[float, dict[int, float]] = {}
    for record in records:
        options = record["options"]
        loss = row.tested(record)
        if loss is not None and _text({k: v for k, v in options.items() if k not in free}) == wanted:
            found.setdefault(options["learning_rate"], {})[options["seed"]] = loss
    return found


def best_rate(rates: Rates, seeds: Sequence[int]) -> float | None:
    """Return the rate of the lowest mean loss, of those that all of these seeds were run with."""
    full = {rate: sum(losses[s] for s in seeds) for rate, losses in rates.items() if {*seeds} <= {*losses}}
    return min(full, key=lambda rate: full[rate]) if full else None


def dominance(grid: Grid, records: Sequence[Record]) -> str:
    """Return a Markdown table: a line for each pair that was run."""
    known = by_key(records)
    rows = {row.label: row for row in grid.rows}
    lines = [
        "| default answer | rate | loss | alternative | rate | minus it | seeds | |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | --- |",
    ]
    for label, other in (pair for pair in PAIRS if {*pair} <= {*rows}):
        own, control = by_seed(grid, rows[label], known), by_seed(grid, rows[other], known)
        gaps = differences(own, [control])
        if not gaps:
            continue
        error = standard_error(gaps) if len(gaps) > 1 else 0.0
        verdict = "dominated" if statistics.mean(gaps) > error else ""
        rates = [choice_text(grid.chosen(rows[name], known) or {}) for name in (label, other)]
        loss, gap = mean_and_error([*own.values()], lower=True), mean_and_error(gaps, lower=True, sign=True)
        lines.append(f"| {label} | {rates[0]} | {loss} | {other} | {rates[1]} | {gap} | {len(gaps)} | {verdict} |")
    return "\n".join(lines)


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


def stability(rows: Sequence[Choices], against: Sequence[str]) -> str:
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


def _text(options: Mapping[str, object]) -> str:
    return json.dumps(options, sort_keys=True)


if __name__ == "__main__":
    main()
