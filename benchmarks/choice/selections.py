"""What every rule chooses, without a training: how stable it is over seeds, and what it costs.

    python benchmarks/choice/selections.py reviews               # each selection in a process of its own
    python benchmarks/choice/selections.py reviews --shuffled    # the same with the labels of other rows (MiniLM only)
    python benchmarks/choice/selections.py reviews --table
    python benchmarks/choice/selections.py roget --dtype float32 --output_dir benchmarks/results/choice/selections

Seconds of two machines or precisions have no common table, so the last command keeps its own records. Plans are left in
``plans`` beside the records, by default those of the bed, each with a control, whose ranks are dealt at random to sites
of the same shape. Those that stage ``transfer`` trains on another bed are packed: plans.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm import tqdm

from weightlora.bench.grid import Row, read_grid
from weightlora.bench.records import append_record, provenance, read_records
from weightlora.files import read_mapping
from weightlora.plan.plan import AdapterPlan
from weightlora.runs.recipe import option_words, read_recipe
from weightlora.runs.train import fit, plan, prepare
from weightlora.selection.steps import likeness

HERE = Path(__file__).parent
#: Steps of LoRA on all sites that are timed, and the training that costs are a share of.
TIMED, TRAINING = 20, 1000


def main() -> None:
    """Select with each rule and seed that has no record yet, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bed", choices=sorted(read_mapping(HERE / "beds.yaml")))
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0, 1, ... (default: 5)")
    parser.add_argument(
        "--rules", nargs="*", help="rows of the stage screening (default: lora and all that have a rule)"
    )
    parser.add_argument("--shuffled", action="store_true", help="give every row the label of another one")
    parser.add_argument("--table", action="store_true", help="print what is known")
    parser.add_argument("--output_dir", type=Path, help="folder of records and plans (default: the bed's)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked, words = parser.parse_known_args()
    grid = read_grid([HERE / f"beds.yaml#{asked.bed}", HERE / "stages.yaml#screening"], asked.output_dir, words)
    rows = {row.label: row for row in grid.rows if "rule" in row.options or row.label == "lora"}
    path = grid.output_dir / "selections.jsonl"
    if asked.table:
        _print_table(read_records(path))
    elif asked.one is not None:
        label, seed = json.loads(asked.one)
        rate = rows[label].choices[0]["learning_rate"]
        append_record(path, _selected(rows[label], seed, rate, grid.output_dir / "plans", shuffled=asked.shuffled))
    else:
        known = {(r["rule"], r["seed"], r["shuffled"]) for r in read_records(path)}
        wanted = itertools.product(range(asked.seeds), asked.rules or rows)
        missing = [(label, seed) for seed, label in wanted if (label, seed, asked.shuffled) not in known]
        for label, seed in tqdm(missing):
            one = ["--one", json.dumps([label, seed])]
            subprocess.run([sys.executable, __file__, *sys.argv[1:], *one], check=True, stderr=subprocess.DEVNULL)


def _selected(row: Row, seed: int, rate: float, plans: Path, *, shuffled: bool) -> dict[str, Any]:
    """The record of one selection; of LoRA on all sites, that of some steps of its training.

    Seconds are those of the processor, so that what else runs on the machine does not count.
    """
    trained = row.label == "lora"
    options = {**row.options, "learning_rate": rate, "seed": seed, **({"max_steps": TIMED} if trained else {})}
    with TemporaryDirectory() as scratch:
        run = prepare(read_recipe(words=option_words(options), output_dir=scratch), measured=False)
        if shuffled:
            run.trainer.train_dataset = with_shuffled_labels(run.trainer.train_dataset, seed)
        loaded = _peak()
        begin = time.process_time()
        method = plan(run)
        if trained:
            begin = time.process_time()
            fit(run, method)
        seconds, peak = time.process_time() - begin, _peak()
        steps = method.plan.options.get("scored", method.plan.options.get("steps"))
    if not trained:
        plans.mkdir(parents=True, exist_ok=True)
        name = f"{row.label}-{seed}{'-shuffled' if shuffled else ''}"
        method.plan.save(plans / f"{name}.json")
        with_dealt_ranks(method.plan, seed).save(plans / f"{name}-dealt.json")
    ranks = {name: r for name, r in method.plan.ranks.items() if r}
    return {
        "rule": row.label,
        "seed": seed,
        "shuffled": shuffled,
        "steps": steps,
        "ranks": ranks,
        "agreement": method.plan.options.get("agreement"),
        "seconds": round(seconds, 2),
        "bytes": peak - loaded,
        "provenance": provenance(),
    }


def with_dealt_ranks(chosen: AdapterPlan, seed: int) -> AdapterPlan:
    """Return the plan with its ranks dealt to sites of the same shape: as many parameters, and no choice among them."""
    dealer = np.random.default_rng(seed)
    entries = list(chosen.entries)
    shapes = [(entry.site.in_features, entry.site.out_features, entry.lora_r) for entry in entries]
    for shape in sorted(set(shapes)):
        places = [i for i, own in enumerate(shapes) if own == shape]
        for place, source in zip(places, dealer.permutation(places), strict=True):
            given = chosen.entries[source]
            entries[place] = replace(entries[place], r=given.r, alpha=given.alpha)
    return replace(chosen, entries=tuple(entries))


def with_shuffled_labels(rows: Any, seed: int) -> Dataset:
    """Return the rows, each with the label of another one."""
    column = next(name for name in ("label", "labels") if name in rows.column_names)
    order = np.random.default_rng(seed).permutation(len(rows))
    labels = [rows[column][i] for i in order]
    return rows.remove_columns(column).add_column(column, labels)


def _peak() -> int:
    """The most memory that this process has had so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _print_table(records: Sequence[dict[str, Any]]) -> None:
    """A line for each rule: how alike its choices are, how far halves of its batches agree, seconds and memory."""
    of = {(r["rule"], r["shuffled"], r["seed"]): r for r in records}
    training = [r for r in records if r["rule"] == "lora"]
    step = statistics.median(r["seconds"] for r in training) / TIMED
    room = statistics.median(r["bytes"] for r in training)
    print(f"LoRA on all sites: {step:.3f} s of the processor a step, {room / 2**20:.0f} MiB above the loaded model")
    print("| rule | seeds | Jaccard over seeds | with shuffled labels | agreement | seconds | % of 1,000 steps | MiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for rule in dict.fromkeys(r["rule"] for r in records if r["rule"] != "lora"):
        own = [r for r in records if r["rule"] == rule and not r["shuffled"]]
        pairs = [(r, of[rule, True, r["seed"]]) for r in own if (rule, True, r["seed"]) in of]
        agreements = [r["agreement"] for r in own if r["agreement"] is not None]
        seconds = statistics.median(r["seconds"] for r in own)
        cells = [
            *(rule, str(len(own)), _mean(likeness(a["ranks"], b["ranks"]) for a, b in itertools.combinations(own, 2))),
            *(_mean(likeness(a["ranks"], b["ranks"]) for a, b in pairs), _mean(agreements), f"{seconds:.1f}"),
            *(f"{100 * seconds / (TRAINING * step):.1f}", f"{statistics.median(r['bytes'] for r in own) / 2**20:.0f}"),
        ]
        print(f"| {' | '.join(cells)} |")


def _mean(values: Iterable[float]) -> str:
    known = list(values)
    return f"{statistics.mean(known):.2f}" if known else "–"


if __name__ == "__main__":
    main()
