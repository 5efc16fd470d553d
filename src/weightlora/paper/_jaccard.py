"""How alike the chosen sites of different seeds are: the paper's Figure 5."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from itertools import combinations

from weightlora.bench.grid import Grid, Point, Record, by_key
from weightlora.bench.table import Cell, Table
from weightlora.paper.picture import Heat, Picture
from weightlora.paper.study import Study
from weightlora.runs.gradient_study import Overlap


def jaccard(one: Collection[str], other: Collection[str]) -> float:
    """Return |A∩B| / |A∪B|; two empty sets are alike.

    Example:
        >>> jaccard("abcdefghij", "abcdefghik")  # one of ten differs: 9 / 11, the paper's 0.82
        0.8181818181818182
    """
    either = {*one} | {*other}
    return len({*one} & {*other}) / len(either) if either else 1.0


def stability(study: Study, grid: Grid, records: Sequence[Record]) -> tuple[Table, Picture | None]:
    """Return a matrix over the seeds for each row, and a table of its means and least values."""
    known = by_key(records)
    header = ("choice", "adapters", "runs", "mean", "least", "equal pairs", "at random")
    body: list[tuple[Cell, ...]] = []
    heats: list[Heat] = []
    for row in grid.rows:
        points = [Point(row, row.learning_rates[0], seed) for seed in grid.seeds]
        found = [known[point.key] for point in points if point.key in known and "kept" in known[point.key]]
        kept = [record["kept"] for record in found]
        pairs = [jaccard(one, other) for one, other in combinations(kept, 2)]
        if not pairs:
            body.append(tuple(map(Cell, (row.label, "–", str(len(kept)), "–", "–", "–", "–"))))
            continue
        size = round(statistics.mean(map(len, kept)))
        chance = Overlap(found[0]["sites"], size, 0).jaccard_by_chance
        equal = f"{sum(pair == 1 for pair in pairs)} of {len(pairs)}"
        numbers = (f"{statistics.mean(pairs):.2f}", f"{min(pairs):.2f}", equal, f"{chance:.2f}")
        body.append(tuple(map(Cell, (row.label, str(size), str(len(kept)), *numbers))))
        seeds = tuple(str(record["options"]["seed"]) for record in found)
        matrix = tuple(tuple(jaccard(one, other) for other in kept) for one in kept)
        heats.append(Heat(row.label, "seed", "seed", "Jaccard similarity", seeds, seeds, matrix, (0, 1)))
    picture = Picture(f"{study.title} ({study.place})", tuple(heats)) if heats else None
    return Table(header, tuple(body), "Jaccard similarity of the kept adapters of two seeds"), picture
