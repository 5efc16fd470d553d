"""What the processes of tests/bench/test_bench.py run; a spawned one can import nothing of a test."""

import os
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import torch

from weightlora.cli import main


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


def run(config, output_dir, answer):
    """The command; answers its code and what it said."""
    torch.set_num_threads(1)  # as tests/real_parts.py does
    said = StringIO()
    with redirect_stderr(said), redirect_stdout(StringIO()):
        code = main(["bench", "--config", config, "--output_dir", output_dir])
    answer.send((code, said.getvalue()))
