"""Which alpha carries the user's learning rate to a lower rank: loss of each rank, rule of alpha and rate.

    weightlora bench --config benchmarks/choice/roget.yaml benchmarks/choice/stages.yaml#alpha --learning_rate 2e-3
    python benchmarks/choice/alpha.py benchmarks/choice/roget.yaml benchmarks/choice/stages.yaml#alpha

Every rate that has a record is shown. The last column is the loss minus that of the same rank at its own best rate with
alpha/r fixed, paired by seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from weightlora.bench.engine import recorded
from weightlora.bench.grid import Grid, Point, Row, read_grid
from weightlora.bench.records import Record
from weightlora.bench.table import differences, mean_and_error

#: Losses by seed, by rate.
Rates = Mapping[float, Mapping[int, float]]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="+", help="a bed's file, and stages.yaml#alpha")
    parser.add_argument("--head_learning_rate", help="as the benchmark was run with")
    asked = parser.parse_args()
    words = [] if asked.head_learning_rate is None else ["--head_learning_rate", asked.head_learning_rate]
    grid = read_grid(asked.config, words=words)
    print(table(grid, recorded(grid)))


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


def table(grid: Grid, records: Sequence[Record]) -> str:
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


def _text(options: Mapping[str, object]) -> str:
    return json.dumps(options, sort_keys=True)


if __name__ == "__main__":
    main()
