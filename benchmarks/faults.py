"""Page faults of training steps: what glibc's default costs, which hands back freed memory that the next step needs.

    python benchmarks/faults.py               # appends benchmarks/results/faults.jsonl, about six minutes
    python benchmarks/faults.py smollm2 --rounds 2 --steps 15

Stock LoRA and the fast step on all sites, each alone in a fresh process with two threads, since what is returned
depends on what else lies in the heap; with glibc's default and with ``keep_freed_memory()``, interleaved.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from typing import Any

import torch
from step import RESULTS, SETTINGS, STOCK_0, make_rows
from tqdm import tqdm

from weightlora.bench.records import append_record
from weightlora.cost.step_time import now
from weightlora.fast.allocator import keep_freed_memory

ROWS = (STOCK_0, "fast, dropout 0")
ALLOCATORS = ("default", "keeps freed memory")
WARMUPS = 3


def main() -> None:
    """Measure all, or (in a process of its own) one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="minilm", choices=("minilm", "smollm2"))
    parser.add_argument("--rounds", type=int, default=4, help="processes of each kind; default: %(default)s")
    parser.add_argument("--steps", type=int, default=40, help="timed steps in each; default: %(default)s")
    parser.add_argument("--alone", nargs=2, metavar=("ROW", "ALLOCATOR"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(alone(arguments.what, *arguments.alone, steps=arguments.steps)))
        return
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    jobs = [[row, allocator] for _ in range(arguments.rounds) for row in ROWS for allocator in ALLOCATORS]
    for job in tqdm(jobs, desc="processes"):
        words = [sys.executable, __file__, arguments.what, "--steps", str(arguments.steps), "--alone", *job]
        ran = subprocess.run(words, env=own, stdout=subprocess.PIPE, text=True, check=True)
        record = json.loads(ran.stdout.splitlines()[-1])
        append_record(RESULTS / "faults.jsonl", record)
        tqdm.write("{row:22} {allocator:20} {milliseconds} ms, {faults} faults".format(**record))


def alone(model_name: str, name: str, allocator: str, *, steps: int) -> dict[str, Any]:
    """Medians over the steps of one row: milliseconds, page faults, milliseconds in the kernel (a mean)."""
    if allocator != ALLOCATORS[0]:
        keep_freed_memory()
    torch.set_num_threads(2)
    setting = SETTINGS[model_name]()
    model = make_rows(setting)[name]().model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    seconds, faults, kernel = [], [], []
    for step in range(WARMUPS + steps):
        before, start = resource.getrusage(resource.RUSAGE_SELF), now()
        model(**setting.batches[step % len(setting.batches)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(now() - start)
        after = resource.getrusage(resource.RUSAGE_SELF)
        faults.append(after.ru_minflt - before.ru_minflt)
        kernel.append(after.ru_stime - before.ru_stime)
    return {
        "model": model_name,
        "row": name,
        "allocator": allocator,
        "milliseconds": round(1e3 * statistics.median(seconds[WARMUPS:]), 1),
        "faults": statistics.median(faults[WARMUPS:]),
        "kernel_milliseconds": round(1e3 * statistics.mean(kernel[WARMUPS:]), 1),
    }


if __name__ == "__main__":
    main()
