"""A grid → records.jsonl: what is recorded already is not run again, and whoever is stopped goes on."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from weightlora.bench._job import Job
from weightlora.bench._workers import run_here, run_on_ray
from weightlora.bench.grid import Grid, Point, Record, by_key, key_of
from weightlora.bench.records import append_record, read_records
from weightlora.errors import OptionError
from weightlora.files import only_writer, remove_drafts, replace_folder, written
from weightlora.runs.files import ADAPTER

RECORDS_FILE = "records.jsonl"
_RUNS, _ADAPTERS = "runs", "adapters"

Report = Callable[["Record | None", int, int], None]
"""``report(record, done, wanted)``: called before the first run, with None, and after each."""


def run_grid(
    grid: Grid, *, workers: int = 1, on_ray: bool = False, retry: bool = False, report: Report
) -> list[Record]:
    """Run what has no record yet, first what the learning rates are chosen with, and return all records.

    Args:
        grid: The benchmark.
        workers: Runs at once; torch's threads, which OMP_NUM_THREADS limits, are shared among them.
        on_ray: Run on a Ray cluster instead.
        retry: Run again what failed.
        report: Told of each run.

    Raises:
        OptionError: Another process works on the same benchmark, or ``workers`` is out of its range.
        OutputError: The disk is full, or a file cannot be written; the same call goes on.
    """
    if workers < 1:
        raise OptionError(f"workers={workers} is not allowed: give at least 1")
    folder = grid.output_dir
    with only_writer(folder), written(folder):
        remove_drafts(folder / _ADAPTERS)
        _run_missing(grid, grid.tuning, workers, on_ray, retry, report)
        _run_missing(grid, grid.tested(by_key(recorded(grid))), workers, on_ray, retry, report)
        shutil.rmtree(folder / _RUNS, ignore_errors=True)
    return recorded(grid)


def recorded(grid: Grid) -> list[Record]:
    """Return the records that there are."""
    return read_records(grid.output_dir / RECORDS_FILE)


def adapter_folder(grid: Grid, point: Point) -> Path:
    """Return the folder in which ``keep_adapters`` leaves the adapter of a run."""
    several = [f"lr{point.learning_rate:g}"] if len(grid.learning_rates) > 1 else []
    several += [f"seed{point.seed}"] if len({*grid.seeds, *grid.tuning_seeds}) > 1 else []
    name = re.sub(r"[^\w.]+", "_", "-".join([point.row.label, *several]))
    return grid.output_dir / _ADAPTERS / name


def _run_missing(grid: Grid, points: Sequence[Point], workers: int, on_ray: bool, retry: bool, report: Report) -> None:
    records = by_key(recorded(grid))
    good = {key for key, record in records.items() if not (retry and record["status"] == "failed")}
    missing = list({point.key: point for point in points if point.key not in good}.values())
    threads = max(1, torch.get_num_threads() // workers)
    folder = (grid.output_dir / _RUNS).absolute()
    jobs = [Job(point.options, folder / point.key, grid.timing_rounds, threads) for point in missing]
    points_by_key = {point.key: point for point in missing}
    if jobs:
        report(None, 0, len(jobs))
    for done, record in enumerate(_finished(jobs, workers, on_ray), 1):
        key = key_of(record["options"])
        if grid.keep_adapters and record["status"] == "ok":
            replace_folder(folder / key / ADAPTER, adapter_folder(grid, points_by_key[key]))
        append_record(grid.output_dir / RECORDS_FILE, record)
        shutil.rmtree(folder / key, ignore_errors=True)
        report(record, done, len(jobs))


def _finished(jobs: Sequence[Job], workers: int, on_ray: bool) -> Iterator[dict[str, Any]]:
    if not jobs:
        return iter(())
    return run_on_ray(jobs) if on_ray else run_here(jobs, min(workers, len(jobs)))
