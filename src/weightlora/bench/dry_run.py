"""What a benchmark will cost: a few steps of each kind of run are timed, and nothing is recorded."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from weightlora.bench._job import Job
from weightlora.bench._sample import sample_job
from weightlora.bench.engine import HERE, Where, final, recorded
from weightlora.bench.grid import Grid, Point
from weightlora.bench.schedule import makespan, row_key

Sample = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """Runs that differ only in seed and learning rate, and so cost the same."""

    label: str
    """The row of the table."""
    task: str
    runs: int
    """How many have no record."""
    steps: int
    """Optimizer steps of one run."""
    seconds: float
    """Of one run, from its start to its record."""
    peak_bytes: int
    """Most memory of its process, on the GPU where there is one; 0 where it is not known."""
    error: str = ""
    """Why it could not be timed; the other numbers are 0 then."""


@dataclass(frozen=True)
class DryRun:
    """What the runs of a benchmark that have no record will cost."""

    kinds: tuple[Kind, ...]
    recorded: int
    """Runs that have a record."""
    slots: int
    """Runs at once."""
    seconds: float
    """Until the last run ends; those that could not be timed are left out."""

    @property
    def runs(self) -> int:
        """How many have no record."""
        return sum(kind.runs for kind in self.kinds)

    @property
    def steps(self) -> int:
        """Optimizer steps of all runs."""
        return sum(kind.runs * kind.steps for kind in self.kinds)

    @property
    def peak_bytes(self) -> int:
        """Most memory of all runs at once, each of the largest kind."""
        at_once = min(self.slots, self.runs)
        return at_once * max((kind.peak_bytes for kind in self.kinds), default=0)


def dry_run(
    grid: Grid,
    *,
    where: Where = HERE,
    retry: bool = False,
    report: Callable[[Point, int, int], None],
) -> DryRun:
    """Return what the runs without a record will cost, from one short run of each kind.

    As many short runs are timed at once as there will be runs at once, since they slow each other.

    Args:
        grid: The benchmark; nothing is written to its folder.
        where: Where it will run.
        retry: Whether failed runs will be run again.
        report: ``report(point, done, wanted)`` is called after each short run.

    Raises:
        OptionError: Ray is not installed, or the cluster lacks the resources of a run.
    """
    known = final(recorded(grid), retry=retry)
    phases = grid.left(known)
    done = {point.key for point in (*grid.tuning, *grid.tested(known)) if point.key in known}
    runs = Counter(_kind(point) for phase in phases for point in phase)
    if not runs:
        return DryRun((), len(done), where.workers, 0.0)
    slots = where.slots()
    points = {_kind(point): point for phase in phases for point in phase}
    jobs = _filled([Job(p.options, Path(), grid.timing_rounds, where.threads) for p in points.values()], slots)
    samples: dict[str, list[Sample]] = {kind: [] for kind in points}
    for number, sample in enumerate(_samples(jobs, slots, where), 1):
        kind = row_key(sample["options"])
        samples[kind].append(sample)
        report(points[kind], number, len(jobs))
    kinds = {kind: _cost(points[kind], runs[kind], samples[kind]) for kind in points}
    starts = [sample["start_seconds"] for some in samples.values() for sample in some if sample["status"] == "ok"]
    start = statistics.mean(starts) if starts else 0.0
    per_run, per_phase = (start, 0.0) if where.new_process_per_run else (0.0, start)
    seconds = sum(
        per_phase + makespan((per_run + kinds[_kind(point)].seconds for point in phase), slots)
        for phase in phases
        if phase
    )
    return DryRun(tuple(kinds.values()), len(done), slots, seconds)


def _kind(point: Point) -> str:
    return row_key(point.options)


def _filled(jobs: Sequence[Job], slots: int) -> list[Job]:
    """Each job once, and some again, so that all slots are busy all the time."""
    return list(islice(cycle(jobs), slots * math.ceil(len(jobs) / slots)))


def _samples(jobs: Sequence[Job], slots: int, where: Where) -> Iterator[Sample]:
    """Time each job in a process of its own, whose memory is that of this job alone; ``slots`` of them at once."""
    for first in range(0, len(jobs), slots):
        submitted = time.time()
        for sample in where.finished(jobs[first : first + slots], sample_job, new_processes=True):
            start = sample["began"] - submitted + sample["imports"] if sample["status"] == "ok" else 0.0
            yield {**sample, "start_seconds": max(0.0, start)}


def _cost(point: Point, runs: int, samples: Sequence[Sample]) -> Kind:
    """The means of a kind's short runs."""
    good = [sample for sample in samples if sample["status"] == "ok"]
    label, task = point.row.label, point.row.task
    if not good:
        return Kind(label, task, runs, 0, 0.0, 0, error=samples[0]["error"])
    seconds = statistics.mean(sample["seconds"] for sample in good)
    return Kind(label, task, runs, good[0]["steps"], seconds, max(sample["peak_bytes"] for sample in good))
