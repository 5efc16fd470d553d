"""When a benchmark will be finished: runs of known length, begun in order by a number of workers."""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Iterable, Sequence

from weightlora.bench.grid import Grid, Point, Record, by_key, key_of


def makespan(seconds: Iterable[float], slots: int) -> float:
    """Return after how many seconds the last run ends; each begins when one before it leaves a slot.

    Args:
        seconds: Of each run, in the order in which they begin.
        slots: Runs at once.

    Example:
        >>> makespan([3, 1, 1, 4], slots=2)  # 3 beside 1 and 1, then 4 from second 2
        6.0
    """
    ends = [0.0] * slots
    for length in seconds:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


def seconds_left(grid: Grid, records: Sequence[Record], slots: int) -> float | None:
    """Return how long the runs without a record will take; None where no run was successful.

    A run takes as long as the mean of its row's recorded ones; where there is none, as the mean of all.

    Args:
        grid: The benchmark.
        records: Those that there are.
        slots: Runs at once.
    """
    known = by_key(records)
    times = {key: _seconds(record) for key, record in known.items() if record["status"] == "ok"}
    if not times:
        return None
    of_row = {row_key(record["options"]): list[float]() for record in records}
    for key, seconds in times.items():
        of_row[row_key(known[key]["options"])].append(seconds)
    every = statistics.mean(times.values())

    def expected(point: Point) -> float:
        own = of_row.get(row_key(point.options))
        return statistics.mean(own) if own else every

    return sum(makespan(map(expected, points), slots) for points in grid.left(known))


def _seconds(record: Record) -> float:
    return record.get("run_seconds") or record["selection_seconds"] + record["training_seconds"]


def row_key(options: Record) -> str:
    """Return what runs have in common that differ only in seed and learning rate, and so cost the same."""
    return key_of({k: v for k, v in options.items() if k not in ("learning_rate", "seed")})
