"""What the processes of tests/bench/test_bench.py run; a spawned one can import nothing of a test."""

import os
import sys
import time
from pathlib import Path

import torch

from weightlora.bench.engine import run_grid
from weightlora.bench.grid import read_grid


def die_at_seed_one(job):
    """Do no work, and die where the seed is 1."""
    if job.options["seed"] == 1:
        os._exit(9)
    return {"options": dict(job.options), "status": "ok"}


def sleep_at_seed_one(job):
    """Do no work, and not return where the seed is 1."""
    if job.options["seed"] == 1:
        time.sleep(600)
    return {"options": dict(job.options), "status": "ok"}


def run(config, output_dir):
    """The whole benchmark, as the command runs it."""
    torch.set_num_threads(1)  # as tests/conftest.py does
    run_grid(read_grid(config, Path(output_dir)), report=lambda *_: None)


if __name__ == "__main__":
    run(*sys.argv[1:])
