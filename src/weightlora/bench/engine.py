"""A grid → records.jsonl: what is recorded already is not run again, and whoever is stopped goes on."""

from __future__ import annotations

import heapq
import re
import shutil
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weightlora.bench._workers import LOG, Job, Run, ray_slots, run_here, run_job, run_on_ray
from weightlora.bench.grid import Grid, Point, choice_text, unrecorded
from weightlora.bench.records import Record, append_record, by_key, key_of, read_runs
from weightlora.errors import OptionError
from weightlora.files import only_writer, remove_drafts, write_text, written
from weightlora.folders import own_files, replace_folder, require_replaceable
from weightlora.runs.files import ADAPTER, BENCH, RECORDS_FILE, require_output

_ADAPTERS, _LOGS = "adapters", "logs"
#: Where the runs work: hidden, so that it meets no folder of the user.
_RUNS = ".weightlora-runs"
#: Of each part of a folder's name; the key alone tells the folders apart.
_LETTERS = 32


@dataclass(frozen=True)
class Where:
    """Where the runs of a benchmark run, and how many at once."""

    workers: int = 1
    """Processes of this machine; torch's threads, which OMP_NUM_THREADS limits, are shared among them."""
    on_ray: bool = False
    """Run on a Ray cluster instead."""
    gpus_per_run: float = 0
    """GPUs that Ray gives a run; two runs of 0.5 share one."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise OptionError(f"workers={self.workers} is not allowed: give at least 1")
        gpus = self.gpus_per_run
        if not (0 <= gpus <= 1 or (1 < gpus < float("inf") and gpus == int(gpus))):
            raise OptionError(f"gpus_per_run={gpus:g} is not allowed: give 0 to 1, or a whole number")
        if gpus and not self.on_ray:
            raise OptionError(f"gpus_per_run={gpus:g} needs Ray; add --ray, or leave it out")

    @property
    def threads(self) -> int:
        """Torch's threads of a run."""
        return max(1, torch.get_num_threads() // self.workers)

    def slots(self) -> int:
        """Return how many runs there are at once; a Ray cluster is asked.

        Raises:
            OptionError: Ray is not installed, or the cluster lacks the resources of a run.
        """
        return ray_slots(self.threads, self.gpus_per_run) if self.on_ray else self.workers

    @property
    def new_process_per_run(self) -> bool:
        """Whether each run has a process of its own: on Ray's GPUs, whose memory a process keeps until its end."""
        return self.on_ray and self.gpus_per_run > 0

    def finished(
        self, jobs: Sequence[Job], run: Run = run_job, *, new_processes: bool = False
    ) -> Iterator[dict[str, Any]]:
        """Run ``jobs`` and yield their records as they end.

        Args:
            jobs: At least one; they are begun in this order.
            run: What each is given to.
            new_processes: Each of at most ``slots()`` jobs has a process of its own.
        """
        if not self.on_ray:
            return run_here(jobs, min(self.workers, len(jobs)), run)
        new = new_processes or self.new_process_per_run
        return run_on_ray(jobs, gpus=self.gpus_per_run, new_processes=new, run=run)


#: One run at a time on this machine.
HERE = Where()


@dataclass(frozen=True)
class BenchProgress:
    """How far a benchmark is: before the first run, and after each."""

    record: Record | None
    """Of the run that has just finished; None before the first."""
    done: int
    wanted: int
    """Runs of this call: first those that the learning rates are chosen with, then, from 0 again, the others."""
    failed: int
    """How many of ``done``."""
    running: tuple[Mapping[str, Any], ...]
    """Options of the runs that are running."""
    seconds_left: float | None
    """Of all runs without a record; None before any run has finished."""


Report = Callable[[BenchProgress], None]


def run_grid(
    grid: Grid, *, where: Where = HERE, retry: bool = False, report: Report, writer: str = BENCH
) -> list[Record]:
    """Run what has no record yet, first what the learning rates are chosen with, and return all records.

    Args:
        grid: The benchmark.
        where: Processes of this machine, or Ray.
        retry: Run again what failed.
        report: Told of each run.
        writer: The command that the benchmark's folder belongs to.

    Raises:
        OptionError: Another process works on the same benchmark, or Ray lacks the resources of a run.
        OutputError: The folder belongs to another command, or a file of the user would be lost. Or the disk is full, or
            a file cannot be written; the same call goes on.
    """
    folder = grid.output_dir
    with only_writer(folder), written(folder):
        require_output(folder, writer, new=[RECORDS_FILE])
        remove_drafts(folder / _ADAPTERS)
        _run_missing(grid, grid.tuning, where, retry, report, writer)
        _run_missing(grid, grid.tested(by_key(recorded(grid))), where, retry, report, writer)
        _remove_runs(folder / _RUNS)
    return recorded(grid)


def recorded(grid: Grid) -> list[Record]:
    """Return the records that there are.

    Raises:
        DataError: A line is no record of a run.
    """
    return read_runs(grid.output_dir / RECORDS_FILE)


def adapter_folder(grid: Grid, point: Point) -> Path:
    """Return the folder in which ``keep_adapters`` leaves the adapter of a run; its key is in the name."""
    several = [f"lr{choice_text(point.choice)}"] if len(point.row.choices) > 1 else []
    several += [f"seed{point.seed}"] if len({*grid.seeds, *grid.tuning_seeds}) > 1 else []
    shown = (re.sub(r"[^A-Za-z0-9.+=-]+", "_", part)[:_LETTERS] for part in (point.row.task, point.row.label, *several))
    return grid.output_dir / _ADAPTERS / "-".join([*shown, point.key])


def log_file(grid: Grid, record: Record) -> Path:
    """Return the file with what a failed run printed, and its traceback."""
    return grid.output_dir / _LOGS / f"{key_of(record['options'])}.txt"


def final(records: Sequence[Record], *, retry: bool) -> dict[str, Record]:
    """Return the records of runs that are not run again, by their key."""
    return {key: record for key, record in by_key(records).items() if not (retry and record["status"] == "failed")}


def _remove_runs(folder: Path) -> None:
    """Remove what runs of this and earlier calls left where they worked."""
    for run in folder.glob("*"):
        if re.fullmatch("[0-9a-f]{12}", run.name):
            shutil.rmtree(run, ignore_errors=True)
    with suppress(OSError):  # not empty, or not there
        folder.rmdir()


def _run_missing(grid: Grid, wanted: Sequence[Point], where: Where, retry: bool, report: Report, writer: str) -> None:
    points = unrecorded(wanted, final(recorded(grid), retry=retry))
    if not points:
        return
    for point in points if grid.keep_adapters else ():
        require_replaceable(adapter_folder(grid, point), writer)
    folder = (grid.output_dir / _RUNS).absolute()
    jobs = [Job(point.options, folder / point.key, grid.timing_rounds, where.threads) for point in points]
    left = {point.key: point for point in points}
    slots, failed = where.slots(), 0

    def tell(record: Record | None) -> None:
        running = tuple(point.options for point in list(left.values())[:slots])  # they are begun in this order
        others = [known for known in recorded(grid) if key_of(known["options"]) not in left]  # those may be repeated
        seconds = seconds_left(grid, others, slots)
        report(BenchProgress(record, len(points) - len(left), len(points), failed, running, seconds))

    with own_files(grid.output_dir, writer):
        pass  # the folder is the writer's from now on
    tell(None)
    for record in where.finished(jobs):
        point = left.pop(key_of(record["options"]))
        if grid.keep_adapters and record["status"] == "ok":
            replace_folder(folder / point.key / ADAPTER, adapter_folder(grid, point), writer)
        _keep_log(log_file(grid, record), record)
        append_record(grid.output_dir / RECORDS_FILE, {k: v for k, v in record.items() if k != LOG})
        shutil.rmtree(folder / point.key, ignore_errors=True)
        failed += record["status"] == "failed"
        tell(record)


def _keep_log(path: Path, record: Record) -> None:
    """Write the log of a run that failed; one that did not has none."""
    if record["status"] == "failed":
        options = "".join(f"{name}: {value}\n" for name, value in record["options"].items())
        write_text(path, f"{options}\n{record['error']}\n\n{record.get(LOG, '')}")
    else:
        path.unlink(missing_ok=True)


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
    known, tuned = by_key(records), grid.tuned
    times = {key: _seconds(record) for key, record in known.items() if record["status"] == "ok"}
    if not times:
        return None
    of_row = {row_key(record["options"], tuned): list[float]() for record in records}
    for key, seconds in times.items():
        of_row[row_key(known[key]["options"], tuned)].append(seconds)
    every = statistics.mean(times.values())

    def expected(point: Point) -> float:
        own = of_row.get(row_key(point.options, tuned))
        return statistics.mean(own) if own else every

    return sum(makespan(map(expected, points), slots) for points in grid.left(known))


def _seconds(record: Record) -> float:
    return record.get("run_seconds") or record["selection_seconds"] + record["training_seconds"]


def row_key(options: Record, tuned: Collection[str]) -> str:
    """Return what runs have in common that differ only in seed and in what is tuned, and so cost about the same."""
    return key_of({k: v for k, v in options.items() if k != "seed" and k not in tuned})
