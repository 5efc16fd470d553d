"""Tables of two stages: which alpha carries the user's rate to a lower rank, and is a default answer ever dominated?

    weightlora bench --config benchmarks/choice/beds.yaml#roget benchmarks/choice/stages.yaml#alpha --learning_rate 2e-3
    python benchmarks/choice/tables.py alpha benchmarks/choice/beds.yaml#roget benchmarks/choice/stages.yaml#alpha

*alpha*: loss of each rank, rule of alpha and rate that has a record. The last column is the loss minus that of the same
rank at its own best rate with alpha/r fixed, paired by seed.

    weightlora bench --config benchmarks/choice/beds.yaml#roget benchmarks/choice/stages.yaml#dominance
    python benchmarks/choice/tables.py dominance benchmarks/choice/beds.yaml#roget \
        benchmarks/choice/stages.yaml#dominance

*dominance*: a line for each default answer of ``PAIRS``: loss minus that of the trivial alternative of the same cost at
each one's best rate, paired by seed. *dominated* is a loss that is more than one standard error above.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from weightlora.bench.engine import recorded
from weightlora.bench.grid import Grid, Point, Row, choice_text, read_grid
from weightlora.bench.records import Record, by_key
from weightlora.bench.table import by_seed, differences, mean_and_error, standard_error

#: Losses by seed, by rate.
Rates = Mapping[float, Mapping[int, float]]
#: The default answer, and what needs no selection at the same cost.
PAIRS = (
    ("parameters 0.25", "LoRA, rank 2"),
    ("parameters 0.05", "random sites, 0.05"),
    ("time 0.8", "LoRA, 0.83 of the steps"),
    ("time 0.6", "LoRA, 0.63 of the steps"),
    ("time 0.6, parameters 0.25", "LoRA, rank 2, 0.63 of the steps"),
)


def main() -> None:
    """Print one of the tables."""
    tables = {"alpha": alpha, "dominance": dominance}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=tables)
    parser.add_argument("config", type=Path, nargs="+", help="the files that the benchmark was run with")
    parser.add_argument("--head_learning_rate", help="as the benchmark was run with")
    parser.add_argument("--learning_rate", help="as the benchmark was run with; alpha has every rate")
    asked = parser.parse_args()
    words = [
        w for name in ("head_learning_rate", "learning_rate") if (v := getattr(asked, name)) for w in (f"--{name}", v)
    ]
    grid = read_grid(asked.config, words=words)
    print(tables[asked.table](grid, recorded(grid)))


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


def _text(options: Mapping[str, object]) -> str:
    return json.dumps(options, sort_keys=True)


if __name__ == "__main__":
    main()
