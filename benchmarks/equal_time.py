"""What LoRA's processor time buys with a store: few rows, several epochs, MiniLM, LoRA beside the upper half.

    nice -n 10 python benchmarks/equal_time.py roget      # what is missing is trained, then the table is printed
    nice -n 10 python benchmarks/equal_time.py reviews --table

One process and one thread, in which runs follow one another; a record is written after each, so that a killed study
goes on. Time is the processor's, of plan, filling and training. The rate of each row is the one with the lowest loss on
rows held out, on seed 0; the other seeds are reported on, on other rows. Stored rows have no dropout below the floor.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from weightlora.bench.records import append_record, read_records
from weightlora.runs.recipe import read_recipe
from weightlora.runs.train import fit, plan, prepare
from weightlora.trainer.store import store_frozen

RESULTS = Path(__file__).parent / "results" / "equal_time.jsonl"
BEDS: dict[str, dict[str, Any]] = {
    "roget": {"task": "roget", "max_seq_length": 16, "head_learning_rate": 3.6e-2},
    "reviews": {"task": "rotten_tomatoes", "head_learning_rate": 1.5e-2},
}
SHARED = {
    "model_name_or_path": "embedded/minilm",
    "max_train_samples": 500,
    "held_out_samples": 300,
    "max_eval_samples": 500,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 125,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.06,
    "save_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
    "use_cpu": True,
}
KINDS = (
    *("attention.self.query", "attention.self.key", "attention.self.value"),
    *("attention.output.dense", "intermediate.dense", "output.dense"),
)
UPPER = {"lora_target_modules": [f"layer.{block}.{kind}" for block in (3, 4, 5) for kind in KINDS]}
RANK_1 = {"lora_r": 1, "lora_alpha": 2}
STORE = {"store_frozen": "memory", "store_dropout": "off below"}
ROWS: dict[str, dict[str, Any]] = {
    "LoRA, all layers": {"num_train_epochs": 3},
    "LoRA, all layers, fewer steps": {"num_train_epochs": 1.8},
    "LoRA of rank 1, all layers": {"num_train_epochs": 3, **RANK_1},
    "upper half": {"num_train_epochs": 3, **UPPER},
    "upper half, stored": {"num_train_epochs": 3, **UPPER, **STORE},
    "upper half, stored, more epochs": {"num_train_epochs": 5.5, **UPPER, **STORE},
    "time=0.6 with a store": {"num_train_epochs": 3, "method": "selected", "time": 0.6, **STORE},
}
#: On reviews LoRA at 4e-3 learns nothing (docs/lab/choice.md).
RATES = {"roget": (2e-3, 4e-3, 8e-3), "reviews": (1e-3, 2e-3)}
TUNED, SEEDS = 0, (1, 2, 3, 4, 5)


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bed", choices=BEDS)
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many seeds are reported on")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS], help="rows of the table (default: all)")
    parser.add_argument("--table", action="store_true", help="print the table of what is known")
    asked = parser.parse_args()
    done = {key_of(record): record for record in read_records(RESULTS) if record["bed"] == asked.bed}
    tuning = [] if asked.table else [(name, rate, TUNED) for rate in RATES[asked.bed] for name in asked.rows]
    seeds = () if asked.table else SEEDS[: asked.seeds]
    for name, rate, seed in (*tuning, *((name, None, seed) for seed in seeds for name in asked.rows)):
        key = name, rate or tuned(name, done), seed
        if key not in done:
            done[key] = {"bed": asked.bed, "row": name, "rate": key[1], "seed": seed, **trained(BEDS[asked.bed], *key)}
            append_record(RESULTS, done[key])
            print(json.dumps(done[key]), flush=True)
    print(table(done))


def key_of(record: dict[str, Any]) -> tuple[str, float, int]:
    """What a run is known by."""
    return record["row"], record["rate"], record["seed"]


def tuned(name: str, done: dict[tuple[str, float, int], dict[str, Any]]) -> float:
    """The rate of the lowest loss on the rows held out."""
    tried = {rate: run["held_out_loss"] for (row, rate, seed), run in done.items() if (row, seed) == (name, TUNED)}
    return min(tried, key=lambda rate: tried[rate])


def trained(bed: dict[str, Any], name: str, rate: float, seed: int) -> dict[str, Any]:
    """Processor seconds of a run, and what it ends with."""
    row = {"method": "lora", **SHARED, **bed, **ROWS[name], "learning_rate": rate, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        recipe = read_recipe({**row, "output_dir": f"{folder}/run"})
        run = prepare(recipe)
        start = time.process_time()
        method = plan(run)
        if recipe.method.store_frozen is not None:
            store_frozen(run.trainer, dropout="off below")
        fit(run, method)
        seconds = time.process_time() - start
        ends = {"steps": run.trainer.state.global_step, "adapters": len(method.plan.names)}
        return {"seconds": seconds, **ends, **run.task.measure(run.trainer)}


def table(done: dict[tuple[str, float, int], dict[str, Any]]) -> str:
    """Means over the seeds, with standard errors; time relative to LoRA's of the same seed."""
    lines = [
        "| row | rate | epochs | time | loss | accuracy | seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    first = next(iter(ROWS))
    for name, row in ROWS.items():
        if not any(known[0] == name for known in done):
            continue
        rate = tuned(name, done)
        seeds = [s for s in SEEDS if (name, rate, s) in done and (first, tuned(first, done), s) in done]
        own = [done[name, rate, seed] for seed in seeds]
        lora = [done[first, tuned(first, done), seed]["seconds"] for seed in seeds]
        if not own:
            continue
        loss, right = [record["validation_loss"] for record in own], [record["validation_accuracy"] for record in own]
        error = f" ± {statistics.stdev(loss) / len(loss) ** 0.5:.3f}" if len(loss) > 1 else ""
        time_of = statistics.mean(record["seconds"] / whole for record, whole in zip(own, lora, strict=True))
        cells = [name, f"{rate:g}", f"{row['num_train_epochs']:g}", f"{time_of:.2f}"]
        cells += [f"{statistics.mean(loss):.3f}{error}", f"{statistics.mean(right):.3f}", str(len(own))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
