"""A real LLM: exact match of SmolLM2 on held-out puzzles, before and after, for four methods at one budget.

    python benchmarks/reasoning.py            # recipes/smollm2-reasoning.yaml, four methods, three seeds
    python benchmarks/reasoning.py --seeds 0  # one seed
    python benchmarks/reasoning.py table      # Markdown from the stored records

Goes on where it was stopped, in the middle of a run as well: each run is ``weightlora train``.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from weightlora.bench.records import append_record, read_records

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "benchmarks" / "results" / "reasoning.jsonl"
RECIPE = ROOT / "recipes" / "smollm2-reasoning.yaml"
RUNS = ROOT / "runs" / "reasoning"
METHODS = ("lora", "random", "selected")


def main() -> None:
    """Run what has no record yet, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("run", "table"), default="run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    if arguments.what == "run":
        for seed in arguments.seeds:
            for method in METHODS:
                run(method, seed)
    print_table()


def run(method: str, seed: int) -> None:
    """Train one method with one seed: other puzzles' order and another A; the puzzles are the same."""
    from weightlora.runs.recipe import read_recipe
    from weightlora.runs.train import train

    key = {"method": method, "seed": seed}
    if any({k: record[k] for k in key} == key for record in read_records(RECORDS)):
        return
    recipe = read_recipe(RECIPE, [f"--method={method}", f"--seed={seed}", f"--output_dir={RUNS / f'{method}-{seed}'}"])
    append_record(RECORDS, {**key, **{k: v for k, v in train(recipe).items() if k not in key}})


def print_table() -> None:
    """Print method, size, exact match and seconds, each a mean over the seeds."""
    records = read_records(RECORDS)
    print("| method | sites | adapter parameters | before | after | selection s | training s | seeds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for method in METHODS:
        group = [record for record in records if record["method"] == method]
        if group:
            print(f"| {' | '.join(map(str, cells(method, group)))} |")


def cells(method: str, group: list[dict[str, Any]]) -> list[Any]:
    """One line of the table."""
    after = [record["metrics"]["validation_exact_match"] for record in group]
    before = [record["before"]["validation_exact_match"] for record in group]
    error = f" ± {statistics.stdev(after) / len(after) ** 0.5:.3f}" if len(after) > 1 else ""
    seconds = [statistics.mean(record[f"{part}_seconds"] for record in group) for part in ("selection", "training")]
    size = f"{group[0]['adapter_parameters']:,}"
    shown = f"{statistics.mean(before):.3f}", f"{statistics.mean(after):.3f}{error}"
    return [method, group[0]["adapters"], size, *shown, *(f"{s:.0f}" for s in seconds), len(group)]


if __name__ == "__main__":
    main()
