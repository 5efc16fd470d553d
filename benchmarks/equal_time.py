"""What LoRA's processor time buys with a store: few rows, several epochs, MiniLM, LoRA beside the upper half.

    nice -n 10 python benchmarks/equal_time.py            # what is missing is trained, then the table is printed

One process and one thread, in which runs follow one another; a record is written after each, so that a killed study
goes on. Time is the processor's, of plan, filling and training. The rate of each row is the one with the lowest loss on
rows held out, on seed 0; the other seeds are reported on, on other rows. Stored rows have no dropout below the floor.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from weightlora.bench.records import append_record
from weightlora.runs.recipe import read_recipe
from weightlora.runs.train import fit, plan, prepare
from weightlora.trainer.store import store_frozen

RECORDS = Path(__file__).parent / "results" / "equal_time.jsonl"
BED = {
    "model_name_or_path": "embedded/minilm",
    "task": "roget",
    "max_train_samples": 500,
    "held_out_samples": 300,
    "max_eval_samples": 500,
    "max_seq_length": 16,
    "head_learning_rate": 3.6e-2,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 125,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.06,
    "method": "lora",
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
STORED = {**UPPER, "stored": True}
ROWS: dict[str, dict[str, Any]] = {
    "LoRA, all layers": {"num_train_epochs": 3},
    "LoRA, all layers, fewer steps": {"num_train_epochs": 1.8},
    "LoRA of rank 1, all layers": {"num_train_epochs": 3, **RANK_1},
    "upper half": {"num_train_epochs": 3, **UPPER},
    "upper half, stored": {"num_train_epochs": 3, **STORED},
    "upper half, stored, more epochs": {"num_train_epochs": 5.5, **STORED},
}
RATES, TUNED, SEEDS = (2e-3, 4e-3), 0, (1, 2)


def main() -> None:
    """Train what is missing, and print the table."""
    done = {key_of(record): record for record in read()}
    tuning = [(name, rate, TUNED) for rate in RATES for name in ROWS]
    for name, rate, seed in (*tuning, *((name, None, seed) for seed in SEEDS for name in ROWS)):
        key = name, rate or tuned(name, done), seed
        if key not in done:
            done[key] = {"row": name, "rate": key[1], "seed": seed, **trained(*key)}
            append_record(RECORDS, done[key])
            print(json.dumps(done[key]), flush=True)
    print(table(done))


def read() -> list[dict[str, Any]]:
    """The records so far."""
    return [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []


def key_of(record: dict[str, Any]) -> tuple[str, float, int]:
    """What a run is known by."""
    return record["row"], record["rate"], record["seed"]


def tuned(name: str, done: dict[tuple[str, float, int], dict[str, Any]]) -> float:
    """The rate of the lowest loss on the rows held out."""
    return min(RATES, key=lambda rate: done[name, rate, TUNED]["held_out_loss"])


def trained(name: str, rate: float, seed: int) -> dict[str, Any]:
    """Processor seconds of a run, and what it ends with."""
    row = {**BED, **ROWS[name], "learning_rate": rate, "seed": seed}
    stored = row.pop("stored", False)
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(read_recipe({**row, "output_dir": f"{folder}/run"}))
        start = time.process_time()
        method = plan(run)
        if stored:
            store_frozen(run.trainer, dropout="off below")
        fit(run, method)
        seconds = time.process_time() - start
        return {"seconds": seconds, "steps": run.trainer.state.global_step, **run.task.measure(run.trainer)}


def table(done: dict[tuple[str, float, int], dict[str, Any]]) -> str:
    """Means over the seeds, with standard errors; time relative to LoRA's of the same seed."""
    lines = [
        "| row | rate | epochs | time | loss | accuracy | seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    first = next(iter(ROWS))
    for name, row in ROWS.items():
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
