"""Trained adapters of rank 8 and 64, cut without training: one budget over all sites beside PEFT's ways.

    python benchmarks/squeeze/after.py run      # two beds of MiniLM, three of SmolLM2
    python benchmarks/squeeze/after.py table    # the stored records as Markdown

"one rank": PEFT's convert_to_lora(model, rank). "one threshold": its convert_to_lora(model, share), at the largest
share of each layer's squared norm that fits. "one budget": `squeeze` without data. "weighted": `squeeze` with 16
batches of the training. "weighted, one rank": the same directions with as many in each layer. "random": at a
quarter, as many directions of each layer as one budget keeps, drawn at random, the control.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from beds import Bed, load_bed, quiet, set_factors, weights
from peft.tuners.lora.conversion import convert_to_lora
from torch import Tensor

from weightlora.bench.records import append_record, provenance, read_records
from weightlora.serving.moments import Directions, adapter_moments, find_directions, kept_ranks

RESULTS = Path(__file__).parent.parent / "results" / "squeeze.jsonl"
#: Rows of the training, and rows whose loss is taken.
BEDS = {
    "roget": (3200, 600),
    "reviews": (3200, 600),
    "kinship": (512, 100),
    "sums": (512, 100),
    "spelling": (1024, 100),
}
RATE = 1e-3
#: Rank → lora_alpha, which grows with the root of the rank.
ALPHAS = {8: 16, 64: 45}
PARTS = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
WAYS = ("one rank", "one threshold", "one budget", "weighted, one rank", "weighted", "random")
BATCHES = 16
#: The row after which an adapter is done; one that was stopped before is begun again.
LAST = {"way": "weighted", "part": 1 / 16}


def main() -> None:
    """Run the study, or print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("run", "table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="default: 0 1")
    parser.add_argument("--beds", nargs="+", default=list(BEDS), choices=BEDS, help="default: all")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=list(ALPHAS), choices=list(ALPHAS), help="default: both"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the records are")
    arguments = parser.parse_args()
    if arguments.study == "table":
        print_table(known(arguments.results))
        return
    with quiet() as folder:
        for seed, r, name in itertools.product(arguments.seeds, arguments.ranks, arguments.beds):
            asked = {"bed": name, "seed": seed, "r": r}
            if {**asked, **LAST} in [{k: r[k] for k in (*asked, *LAST)} for r in known(arguments.results)]:
                continue
            rows, measured = BEDS[name]
            more = {"held_out_samples": 0, "max_eval_samples": measured}
            bed = load_bed(name, seed, r=r, alpha=ALPHAS[r], rows=rows, folder=folder, **more)
            bed.restart(r, ALPHAS[r] / r)
            bed.train(bed.optimizer(), RATE, 0, len(bed.batches))
            for row in cuts(bed, r):
                append_record(arguments.results, {**asked, **row, "provenance": provenance()})


def known(path: Path) -> list[dict[str, Any]]:
    """The records of cuts; those of training.py are in the same file."""
    return [record for record in read_records(path) if "way" in record]


def factors_of(bed: Bed) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Copies of A, B and the scale of each layer."""
    found: dict[str, tuple[Tensor, Tensor, float]] = {}
    for name, layer in bed.layers.items():
        a, b = weights(layer)
        found[name] = (a.detach().clone(), b.detach().clone(), layer.scaling["default"])
    return found


def cuts(bed: Bed, r: int) -> Iterator[dict[str, Any]]:
    """Yield the loss of each cut of the adapter on the model."""
    yield {"way": "whole", "part": 1.0, "loss": bed.measure()["validation_loss"]}
    trained = factors_of(bed)
    moments = adapter_moments(bed.model, bed.batches[:BATCHES])
    plain = {name: find_directions(*own) for name, own in trained.items()}
    weighted = {name: find_directions(*own, moments[name]) for name, own in trained.items()}
    prices = [a.shape[1] + b.shape[0] for a, b, _ in trained.values()]
    require_same_as_peft(bed, trained, plain)
    for part in PARTS:
        most = int(part * r * sum(prices))
        one = [int(part * r)] * len(prices)
        ranks = {
            "one rank": (plain, one),
            "one threshold": (plain, by_threshold(plain, prices, most)),
            "one budget": (plain, kept_ranks([own.gains for own in plain.values()], prices, most, 0.0)),
            "weighted, one rank": (weighted, one),
            "weighted": (weighted, kept_ranks([own.gains for own in weighted.values()], prices, most, 0.0)),
        }
        if part == 1 / 4:
            ranks["random"] = (shuffled(plain, bed.seed), ranks["one budget"][1])
        for way, (found, kept) in ranks.items():
            if kept is None or (way.endswith("one rank") and not kept[0]):
                continue
            put(bed, trained, found, kept)
            used = sum(k * price for k, price in zip(kept, prices, strict=True))
            yield {"way": way, "part": part, "parameters": used, "loss": bed.measure()["validation_loss"]}


def put(bed: Bed, trained: Mapping[str, Any], found: Mapping[str, Directions], kept: Sequence[int]) -> None:
    """Give each layer its first directions."""
    for (name, layer), k in zip(bed.layers.items(), kept, strict=True):
        a, b, _ = trained[name]
        set_factors(layer, *found[name].cut(a, b, k, 1.0), 1.0)


def shuffled(found: Mapping[str, Directions], seed: int) -> dict[str, Directions]:
    """The directions of each layer in a random order."""
    lot = torch.Generator().manual_seed(seed)
    result: dict[str, Directions] = {}
    for name, own in found.items():
        order = torch.randperm(len(own.gains), generator=lot)
        result[name] = Directions(tuple(own.gains[i] for i in order), own.left[:, order], own.right[order])
    return result


def by_threshold(found: Mapping[str, Directions], prices: Sequence[int], most: int) -> list[int] | None:
    """The ranks of the largest threshold that fits; None where rank 1 in each layer does not."""
    low, high = 0.0, 1.0
    fits = None
    for _ in range(40):
        share = (low + high) / 2
        ranks = [threshold_rank(own.gains, share) for own in found.values()]
        if sum(k * price for k, price in zip(ranks, prices, strict=True)) <= most:
            low, fits = share, ranks
        else:
            high = share
    return fits


def threshold_rank(gains: Sequence[float], share: float) -> int:
    """The fewest directions that hold ``share`` of the squared norm, as PEFT counts them."""
    energy = torch.cumsum(torch.tensor(gains, dtype=torch.float64), 0)
    return int(torch.searchsorted(energy, share * energy[-1])) + 1


def require_same_as_peft(bed: Bed, trained: Mapping[str, Any], found: Mapping[str, Directions]) -> None:
    """Raise unless PEFT's own conversion, by a rank and by a threshold, gives these matrices."""
    for rank in (2, 0.9):
        _, state = convert_to_lora(bed.model, rank)
        for name, (a, b, _) in trained.items():
            k = rank if isinstance(rank, int) else threshold_rank(found[name].gains, rank)
            mine_a, mine_b = found[name].cut(a, b, k, 1.0)
            theirs = [next(v for key, v in state.items() if f".{name}.lora_{m}." in f".{key}") for m in "AB"]
            torch.testing.assert_close(theirs[1].double() @ theirs[0].double(), mine_b @ mine_a, rtol=1e-3, atol=1e-5)


def print_table(records: list[dict[str, Any]]) -> None:
    """Print the mean loss over the seeds minus that of the whole adapter."""
    for name, r in itertools.product(BEDS, ALPHAS):
        own = [record for record in records if (record["bed"], record["r"]) == (name, r)]
        whole = {record["seed"]: record["loss"] for record in own if record["way"] == "whole"}
        if not whole:
            continue
        shown = ", ".join(f"{loss:.3f}" for loss in whole.values())
        print(f"\n| {name}, rank {r}, loss {shown} | 1/2 | 1/4 | 1/8 | 1/16 |\n| --- |" + " ---: |" * len(PARTS))
        for way in WAYS:
            cells: list[str] = []
            for part in PARTS:
                rows = [record for record in own if (record["way"], record["part"]) == (way, part)]
                minus = [record["loss"] - whole[record["seed"]] for record in rows]
                cells.append(f"{sum(minus) / len(minus):+.3f}" if minus else "–")
            print(f"| {way} | {' | '.join(cells)} |")
    for way in ("one budget", "weighted"):
        print_gaps(records, way)


def print_gaps(records: list[dict[str, Any]], way: str) -> None:
    """Print the mean loss of ``way`` minus that of one rank, where there is one, and on how many beds it is ahead."""
    losses = {(*(each[key] for key in ("r", "part", "bed", "way")), each["seed"]): each["loss"] for each in records}
    seeds = {each["seed"] for each in records}
    print(f"\n| {way} minus one rank | {' | '.join(BEDS)} | ahead |\n| --- |" + " ---: |" * (len(BEDS) + 1))
    for r, part in itertools.product(ALPHAS, PARTS):
        gaps: list[float] = []
        for bed in BEDS:
            pairs = [(losses.get((r, part, bed, own, seed)) for own in (way, "one rank")) for seed in seeds]
            both = [own - other for own, other in pairs if own is not None and other is not None]
            gaps += [sum(both) / len(both)] if both else []
        if len(gaps) == len(BEDS):
            cells = " | ".join(f"{gap:+.3f}" for gap in gaps)
            print(f"| {r}, 1/{round(1 / part)} | {cells} | {sum(gap < 0 for gap in gaps)} |")


if __name__ == "__main__":
    main()
