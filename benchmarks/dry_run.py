"""Whether ``weightlora bench --dry_run`` is right: a small study is estimated, then run.

Usage: OMP_NUM_THREADS=1 python benchmarks/dry_run.py [--workers 1]

Three methods with two seeds on MiniLM and film reviews, six runs of about 20 seconds on an idle core. Prints the
estimated and the real time of each kind of run and of the whole study. Other work on the machine changes both numbers:
run it where nothing else runs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import yaml

from weightlora.bench.dry_run import dry_run
from weightlora.bench.engine import BenchProgress, Where, run_grid
from weightlora.bench.grid import Grid, Point, read_grid

STUDY = {
    "base": {
        "model_name_or_path": "embedded/minilm",
        "max_train_samples": 1600,
        "held_out_samples": 200,
        "max_eval_samples": 1000,
        "max_seq_length": 32,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "num_train_epochs": 1,
        "use_cpu": True,
    },
    "methods": ["lora", "weightlora", "adalora"],
    "learning_rates": [1e-3],
    "seeds": [0, 1],
    "timing_rounds": 3,
}


def main() -> None:
    """Estimate, run, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1)
    where = Where(parser.parse_args().workers)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "study.yaml"
        config.write_text(yaml.safe_dump(STUDY), encoding="utf-8")
        compare(read_grid(config, Path(folder) / "out"), where)


def compare(grid: Grid, where: Where) -> None:
    """Print the estimated and the real seconds of a study."""
    print(f"{torch.get_num_threads()} thread(s), {where.workers} run(s) at once; load {os.getloadavg()[0]:.1f}")
    start = time.perf_counter()
    found = dry_run(grid, where=where, report=tell_timed)
    print(f"the dry run took {time.perf_counter() - start:.0f} s; load {os.getloadavg()[0]:.1f}")
    start = time.perf_counter()
    records = run_grid(grid, where=where, report=tell_done)
    real = time.perf_counter() - start
    print(
        f"load {os.getloadavg()[0]:.1f}\n\n| | estimated s | real s | estimated ÷ real |\n| --- | ---: | ---: | ---: |"
    )
    for kind in found.kinds:
        own = statistics.mean(r["run_seconds"] for r in records if r["options"]["method"] == kind.label)
        print(f"| one run of {kind.label} | {kind.seconds:.1f} | {own:.1f} | {kind.seconds / own:.2f} |")
    print(f"| {found.runs} runs, processes included | {found.seconds:.1f} | {real:.1f} | {found.seconds / real:.2f} |")


def tell_timed(point: Point, done: int, wanted: int) -> None:
    """Print which kind was timed."""
    print(f"timed {done}/{wanted}: {point.row.label}", flush=True)


def tell_done(progress: BenchProgress) -> None:
    """Print what is left."""
    left = "?" if progress.seconds_left is None else f"{progress.seconds_left:.0f}"
    print(f"{progress.done}/{progress.wanted} done, {left} s left", flush=True)


if __name__ == "__main__":
    main()
