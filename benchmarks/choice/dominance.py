"""Each default answer beside the trivial alternative of the same cost: is it ever dominated?

    weightlora bench --config benchmarks/choice/roget.yaml benchmarks/choice/stages.yaml#dominance
    python benchmarks/choice/dominance.py benchmarks/choice/roget.yaml benchmarks/choice/stages.yaml#dominance

A line for each default answer of ``PAIRS``: loss minus that of its alternative at each one's best rate, paired by seed.
*dominated* is a loss that is more than one standard error above.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from weightlora.bench.engine import recorded
from weightlora.bench.grid import Grid, choice_text, read_grid
from weightlora.bench.records import Record, by_key
from weightlora.bench.table import by_seed, differences, mean_and_error, standard_error

#: The default answer, and what needs no selection at the same cost.
PAIRS = (
    ("parameters 0.25", "LoRA, rank 2"),
    ("parameters 0.05", "random sites, 0.05"),
    ("time 0.8", "LoRA, 0.83 of the steps"),
    ("time 0.6", "LoRA, 0.63 of the steps"),
    ("time 0.6, parameters 0.25", "LoRA, rank 2, 0.63 of the steps"),
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="+", help="the files that the benchmark was run with")
    parser.add_argument("--head_learning_rate", help="as the benchmark was run with")
    parser.add_argument("--learning_rate", help="as the benchmark was run with")
    asked = parser.parse_args()
    words = [
        w for name in ("head_learning_rate", "learning_rate") if (v := getattr(asked, name)) for w in (f"--{name}", v)
    ]
    grid = read_grid(asked.config, words=words)
    print(table(grid, recorded(grid)))


def table(grid: Grid, records: Sequence[Record]) -> str:
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


if __name__ == "__main__":
    main()
