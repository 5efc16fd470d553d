"""What LoRA's processor time buys with a store: few rows, several epochs, LoRA beside its uppermost layers.

    nice -n 10 python benchmarks/equal_time.py roget      # what is missing is trained, then the table is printed
    nice -n 10 python benchmarks/equal_time.py reviews --table
    nice -n 10 python benchmarks/equal_time.py sums --seeds 1      # SmolLM2; the others are MiniLM
    nice -n 10 python benchmarks/equal_time.py roget-1500 --seeds 3

One process and one thread, in which runs follow one another; a record is written after each, so that a killed study
goes on. Time is the processor's, of plan, filling and training. The rate of each row is the one with the lowest loss on
rows held out, on seed 0; sums have one rate. The other seeds are reported on, on other rows. Stored rows have no
dropout below the floor.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import random
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from dropbp import skipped_backward

from weightlora.bench.records import append_record, read_records
from weightlora.model.frozen_prefix import find_blocks
from weightlora.runs.recipe import read_recipe
from weightlora.runs.train import fit, plan, prepare
from weightlora.trainer.store import store_planned

RESULTS = Path(__file__).parent / "results" / "equal_time.jsonl"
SHARED = {
    "per_device_eval_batch_size": 125,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.06,
    "save_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
    "use_cpu": True,
}
MINILM = {
    "model_name_or_path": "embedded/minilm",
    "max_train_samples": 500,
    "held_out_samples": 300,
    "max_eval_samples": 500,
    "per_device_train_batch_size": 32,
}
#: The task of the study's bed of this name (benchmarks/choice/beds.yaml): fewer rows, weights in float32.
SUMS = {
    "model_name_or_path": "embedded/smollm2",
    "task": "reasoning",
    "dataset_name": "reasoning_gym/chain_sum",
    "dataset_config_name": "min_terms=2 max_terms=3 min_digits=1 max_digits=2",
    "max_train_samples": 256,
    "max_eval_samples": 400,
    "teacher_forced": True,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 50,
    "dtype": "float32",
    "bf16": False,
    "gradient_checkpointing": False,
}
BEDS: dict[str, dict[str, Any]] = {
    "roget": {**MINILM, "task": "roget", "max_seq_length": 16, "head_learning_rate": 3.6e-2},
    "reviews": {**MINILM, "task": "rotten_tomatoes", "head_learning_rate": 1.5e-2},
    "sums": SUMS,
}
#: As many rows and epochs as many users have.
BEDS["roget-1500"] = {**BEDS["roget"], "max_train_samples": 1500}
#: A single epoch, in which nothing that is stored is read back.
BEDS["roget-once"] = BEDS["roget-1500"]
EPOCHS = {"roget": 3, "reviews": 3, "sums": 3, "roget-1500": 5, "roget-once": 1}
BERT = (
    *("attention.self.query", "attention.self.key", "attention.self.value"),
    *("attention.output.dense", "intermediate.dense", "output.dense"),
)
LLAMA = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
HALF = "upper half", [f"layer.{block}.{kind}" for block in (3, 4, 5) for kind in BERT]
#: Half of the layers are far too few for SmolLM2.
TWO_THIRDS = "upper two thirds", [f"layers.{block}.{kind}" for block in range(10, 30) for kind in LLAMA]
UPPER = {bed: TWO_THIRDS if bed == "sums" else HALF for bed in BEDS}
#: Epochs of these in about LoRA's time.
MORE = {"upper half": 5.5 / 3, "upper two thirds": 5 / 3}
LORA = "LoRA, all layers"
STORE = {"store_frozen": "memory", "store_dropout": "off below"}
#: The share of backward passes of blocks that a row skips; no option of a recipe.
DROPBP = "dropbp"
#: On reviews LoRA at 4e-3 learns nothing (docs/lab/choice.md).
RATES = {
    "roget": (2e-3, 4e-3, 8e-3),
    "reviews": (1e-3, 2e-3),
    "sums": (1e-3,),
    "roget-1500": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    "roget-once": (2e-3, 4e-3, 8e-3),
}
#: Accuracy of a class, or of a whole answer.
RIGHT = ("validation_accuracy", "validation_exact_match")
TUNED, SEEDS = 0, (1, 2, 3, 4, 5)


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bed", choices=BEDS)
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many seeds are reported on")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="rows of the table (default: all)")
    parser.add_argument("--table", action="store_true", help="print the table of what is known")
    asked = parser.parse_args()
    rows = rows_of(asked.bed)
    names = asked.rows or [*rows]
    if not {*names} <= {*rows}:
        parser.error(f"--rows: {asked.bed} has {', '.join(rows)}")
    done = {key_of(record): record for record in read_records(RESULTS) if record["bed"] == asked.bed}
    rates = RATES[asked.bed]
    tuning = [] if asked.table or len(rates) == 1 else [(name, rate, TUNED) for rate in rates for name in names]
    seeds = () if asked.table else SEEDS[: asked.seeds]
    for name, rate, seed in (*tuning, *((name, None, seed) for seed in seeds for name in names)):
        key = name, rate or tuned(name, rates, done), seed
        if key not in done:
            done[key] = {
                "bed": asked.bed,
                "row": name,
                "rate": key[1],
                "seed": seed,
                **trained({**BEDS[asked.bed], **rows[key[0]]}, *key[1:]),
            }
            append_record(RESULTS, done[key])
            print(json.dumps(done[key]), flush=True)
    print(table(rows, rates, done))


def rows_of(bed: str) -> dict[str, dict[str, Any]]:
    """The rows of a bed's table, by name."""
    name, sites = UPPER[bed]
    epochs, upper = EPOCHS[bed], {"lora_target_modules": sites}
    rows = {
        LORA: {},
        "LoRA, all layers, fewer steps": {"num_train_epochs": 0.6 * epochs},
        "LoRA of rank 1, all layers": {"lora_r": 1, "lora_alpha": 2},
        name: upper,
        f"{name}, stored": {**upper, **STORE},
        # One draw for all seeds.
        f"random half of the {name}, stored": {
            "lora_target_modules": random.Random(0).sample(sites, len(sites) // 2),
            **STORE,
        },
        f"{name}, stored, more epochs": {"num_train_epochs": MORE[name] * epochs, **upper, **STORE},
        # As many whole steps as are within 0.4 of them.
        "LoRA, all layers, 0.4 of the steps": {"num_train_epochs": 0.393 * epochs},
        "DropBP of 0.8": {DROPBP: 0.8},
        "time=0.6 with a store": {"method": "selected", "time": 0.6, **STORE},
        "time=0.4 with a store": {"method": "selected", "time": 0.4, **STORE},
    }
    return {name: {"num_train_epochs": epochs, **row} for name, row in rows.items()}


def key_of(record: dict[str, Any]) -> tuple[str, float, int]:
    """What a run is known by."""
    return record["row"], record["rate"], record["seed"]


def tuned(name: str, rates: tuple[float, ...], done: dict[tuple[str, float, int], dict[str, Any]]) -> float:
    """The rate of the lowest loss on the rows held out; where there is one rate, it is not tuned."""
    if len(rates) == 1:
        return rates[0]
    tried = {rate: run["held_out_loss"] for (row, rate, seed), run in done.items() if (row, seed) == (name, TUNED)}
    return min(tried, key=lambda rate: tried[rate])


def trained(options: dict[str, Any], rate: float, seed: int) -> dict[str, Any]:
    """Processor seconds of a run, and what it ends with."""
    row = {"method": "lora", **SHARED, **options, "learning_rate": rate, "seed": seed}
    skipped = row.pop(DROPBP, None)
    with tempfile.TemporaryDirectory() as folder:
        recipe = read_recipe({**row, "output_dir": f"{folder}/run"})
        run = prepare(recipe)
        start = time.process_time()
        method = plan(run)
        if recipe.method.store_frozen is not None:
            store_planned(run.trainer, method.plan, dropout="off below")
        blocks = find_blocks(run.trainer.model)[1]
        with nullcontext() if skipped is None else skipped_backward(blocks, skipped, seed=seed):
            fit(run, method)
        seconds = time.process_time() - start
        ends = {"steps": run.trainer.state.global_step, "adapters": len(method.plan.names)}
        return {"seconds": seconds, **ends, **run.task.measure(run.trainer)}


def table(
    rows: dict[str, dict[str, Any]],
    rates: tuple[float, ...],
    done: dict[tuple[str, float, int], dict[str, Any]],
) -> str:
    """Means over the seeds, with standard errors; time relative to LoRA's of the same seed."""
    lines = [
        "| row | rate | epochs | time | loss | accuracy | seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        if not any(known[0] == name for known in done):
            continue
        rate = tuned(name, rates, done)
        seeds = [s for s in SEEDS if (name, rate, s) in done and (LORA, tuned(LORA, rates, done), s) in done]
        own = [done[name, rate, seed] for seed in seeds]
        lora = [done[LORA, tuned(LORA, rates, done), seed]["seconds"] for seed in seeds]
        if not own:
            continue
        loss = [record["validation_loss"] for record in own]
        right = [record[name] for record in own for name in RIGHT if name in record]
        error = f" ± {statistics.stdev(loss) / len(loss) ** 0.5:.3f}" if len(loss) > 1 else ""
        time_of = statistics.mean(record["seconds"] / whole for record, whole in zip(own, lora, strict=True))
        cells = [name, f"{rate:g}", f"{row['num_train_epochs']:g}", f"{time_of:.2f}"]
        cells += [f"{statistics.mean(loss):.3f}{error}", f"{statistics.mean(right):.3f}", str(len(own))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
