"""Is training at rank 8 with one cut over all sites better than training at the lower rank?

    python benchmarks/squeeze/training.py run      # two beds, two seeds, three rates
    python benchmarks/squeeze/training.py run --ranks 1 --beds reviews --seeds 2 3 4 5 --rates 2e-3 4e-3
    python benchmarks/squeeze/training.py table    # the stored records as Markdown

A run of rank 8 is cut after half and after 0.7 of its steps to a quarter and an eighth of its parameters, the price of
rank 2 and rank 1 on all sites. Rate and schedule go on; the head keeps its moments, A and B get new ones. After a cut
the scale is that of LoRA of the lower rank, whose lora_alpha goes with the root of the rank, and A's rows keep their
mean norm: so the rate goes on. Batches, dropout and starts are the same in all rows of a seed.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from beds import Bed, load_bed, quiet, resume_cut, snapshot, weights

from weightlora.bench.records import append_record, provenance, read_records
from weightlora.serving.moments import find_directions, kept_ranks

RESULTS = Path(__file__).parent.parent / "results" / "squeeze.jsonl"
BEDS = {"roget": 3200, "reviews": 3200}
RATES, SEEDS = (2e-3, 1e-3, 4e-3), (0, 1)
R, ALPHA = 8, 16
#: Rank of LoRA with as many parameters → its share of those of rank 8, and its lora_alpha.
LOWER = {1: (0.125, 6), 2: (0.25, 8)}
CUTS = (0.5, 0.7)


def main() -> None:
    """Run the study, or print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("run", "table"))
    parser.add_argument("--ranks", type=int, nargs="+", default=list(LOWER), choices=list(LOWER), help="default: both")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default: %(default)s")
    parser.add_argument("--beds", nargs="+", default=list(BEDS), choices=BEDS, help="default: both")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the records are")
    arguments = parser.parse_args()
    if arguments.study == "table":
        print_table(known(arguments.results))
        return
    with quiet() as folder:
        given = (arguments.ranks, arguments.rates, arguments.seeds, arguments.beds)
        for r, rate, seed, bed in itertools.product(*given):
            rows = BEDS[bed]
            asked = {"bed": bed, "seed": seed, "rate": rate, "rows": rows, "r": r}
            if asked in [{k: record[k] for k in asked} for record in known(arguments.results)]:
                continue
            found = list(run(load_bed(bed, seed, r=R, alpha=ALPHA, rows=rows, folder=folder), rate, r))
            for row in found:
                append_record(arguments.results, {**asked, **row, "provenance": provenance()})


def known(path: Path) -> list[dict[str, Any]]:
    """The records of trainings; those of after.py are in the same file."""
    return [record for record in read_records(path) if "rate" in record]


def run(bed: Bed, rate: float, r: int) -> Iterator[dict[str, Any]]:
    """Yield the rows that end with the parameters of rank r on all sites."""
    steps, (part, alpha) = len(bed.batches), LOWER[r]
    bed.restart(r, alpha / r)
    bed.train(bed.optimizer(), rate, 0, steps)
    yield {"row": f"LoRA, rank {r}", **measured(bed)}
    bed.restart(R, ALPHA / R)
    optimizer, done = bed.optimizer(), 0
    for share in CUTS:
        bed.train(optimizer, rate, done, round(share * steps))
        done = round(share * steps)
        trunk = snapshot(bed, optimizer)
        branch = resume_cut(bed, trunk, cut(trunk, part, alpha / r))
        bed.train(branch, rate, done, steps)
        yield {"row": f"rank 8, cut at {share}", **measured(bed)}
        optimizer = resume_trunk(bed, trunk, optimizer)


def resume_trunk(bed: Bed, trunk: dict[str, Any], optimizer: Any) -> Any:
    """Put the run of rank 8 back, with the moments that it had."""
    old = [state for group in optimizer.param_groups[:1] for p in group["params"] for state in [optimizer.state[p]]]
    new = resume_cut(bed, trunk, trunk["factors"])
    for parameter, state in zip(new.param_groups[0]["params"], old, strict=True):
        new.state[parameter] = state
    return new


def cut(trunk: dict[str, Any], part: float, scale: float) -> dict[str, Any]:
    """Return the factors that one budget over all sites keeps, at ``scale``; A's rows have the mean norm of before."""
    found = {name: find_directions(a, b, s) for name, (a, b, s) in trunk["factors"].items()}
    sizes = {name: a.shape[1] + b.shape[0] for name, (a, b, _) in trunk["factors"].items()}
    most = int(part * sum(R * size for size in sizes.values()))
    ranks = kept_ranks([own.gains for own in found.values()], list(sizes.values()), most, 0.0)
    factors: dict[str, Any] = {}
    for (name, (a, b, _)), k in zip(trunk["factors"].items(), ranks, strict=True):
        new_a, new_b = found[name].cut(a, b, k, 1.0)
        norms = new_a.norm(dim=1) / a.norm(dim=1).mean()
        factors[name] = (new_a / norms.unsqueeze(1), new_b * norms / scale, scale)
    return factors


def measured(bed: Bed) -> dict[str, Any]:
    """Losses on held-out rows, which choose the rate, and on those that are reported; and what is trained."""
    found = bed.measure()
    numbers = sum(w.numel() for layer in bed.layers.values() for w in weights(layer))
    return {"loss": found["validation_loss"], "held_out": found["held_out_loss"], "parameters": numbers}


# --- Table -------------------------------------------------------------------------------------------------------


def print_table(records: list[dict[str, Any]]) -> None:
    """Print each row at its best rate, minus LoRA of the lower rank at its own.

    The rate has the lowest loss on the held-out rows, in the seeds that all of the row's rates have.
    """
    for bed in BEDS:
        print(f"\n| {bed} | rate | loss | minus LoRA of the lower rank |\n| --- | ---: | ---: | ---: |")
        runs: dict[Any, dict[float, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
        for record in (record for record in records if record["bed"] == bed):
            runs[record["r"], record["row"]][record["rate"]][record["seed"]] = record
        best = {key: tuned(of) for key, of in runs.items()}
        for (r, row), (rate, found) in sorted(best.items(), key=lambda pair: pair[0]):
            lower = best.get((r, f"LoRA, rank {r}"))
            shown = "" if lower is None or row == f"LoRA, rank {r}" else difference(found, lower[1])
            losses = [record["loss"] for record in found.values()]
            print(f"| {row} → rank {r} | {rate:g} | {statistics.mean(losses):.3f} | {shown} |")


def tuned(rates: dict[float, dict[int, dict[str, Any]]]) -> tuple[float, dict[int, dict[str, Any]]]:
    """The best rate and its runs by seed."""
    common = set[int].intersection(*map(set, rates.values()))
    return min(rates.items(), key=lambda pair: sum(pair[1][seed]["held_out"] for seed in common))


def difference(found: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]]) -> str:
    """Mean over the seeds, with its standard error."""
    minus = [found[seed]["loss"] - other[seed]["loss"] for seed in found if seed in other]
    error = statistics.stdev(minus) / len(minus) ** 0.5 if len(minus) > 1 else float("nan")
    return f"{statistics.mean(minus):+.3f} ± {error:.3f}"


if __name__ == "__main__":
    main()
