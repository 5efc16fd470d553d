"""The finals on all beds and limits: what each row gains over random sites and over LoRA, from the records.

    python benchmarks/choice/finals.py

Differences are paired by seed. Rows without a run are left out, and so are seeds that random sites or LoRA do not have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from weightlora.bench.engine import recorded
from weightlora.bench.grid import Grid, choice_text, read_grid
from weightlora.bench.records import Record, by_key
from weightlora.bench.table import by_seed, differences, mean_and_error

HERE = Path(__file__).parent
HEAD = ("--head_learning_rate", "1.5e-2")


@dataclass(frozen=True)
class Final:
    """Stages on a bed, with its own random sites and LoRA: runs of another precision are not paired with them."""

    share: str
    """Of LoRA's parameters."""
    stages: str
    """The bed, and the parts of stages.yaml."""
    lora: str = "lora"
    """Its row; of reviews the one whose seeds all learn, or none."""
    words: tuple[str, ...] = ()
    lower: str = "low_rank"
    """How the row of LoRA of a lower rank begins; of sums the one at the better of its two rates."""


FINALS = (
    Final("1/2", "roget kappa-float32"),
    Final("1/2", "roget finals finals-half"),
    Final("1/2", "roget spread-float32 spread-half"),
    Final("1/2", "reviews finals-float32", "lora, 1e-3", HEAD),
    Final("1/2", "reviews kappa-float32", "", HEAD),
    Final("1/2", "reviews spread-float32 spread-half", words=HEAD),
    Final("1/2", "spelling half-spelling"),
    Final("1/2", "sums half-smollm2"),
    Final("1/2", "kinship half-smollm2 half-kinship"),
    Final("1/10", "roget rank-two"),
    Final("1/10", "roget finals finals-tenth"),
    Final("1/10", "roget warmup-rate"),
    Final("1/10", "roget spread"),
    Final("1/10", "roget spread-float32"),
    Final("1/10", "reviews rank-two", "lora, 1e-3", HEAD),
    Final("1/10", "reviews finals finals-tenth finals-reviews", words=HEAD),
    Final("1/10", "reviews spread", words=HEAD),
    Final("1/10", "reviews spread-float32", words=HEAD),
    Final("1/10", "spelling rank-two rank-two-spelling"),
    Final("1/10", "spelling finals-spelling"),
    Final("1/10", "spelling spread-float32 spread-spelling"),
    Final("1/10", "spelling rules-spelling best-spelling"),
    Final("1/10", "sums rank-two rank-two-smollm2", lower="low_rank_tenth, 4e-3"),
    Final("1/10", "sums tenth"),
    Final("1/10", "sums warmup-rate-sums"),
    Final("1/10", "kinship rank-two rank-two-smollm2"),
    Final("1/10", "kinship tenth-float32"),
    Final("1/10", "kinship spread-float32"),
    Final("1/10", "kinship finals-smollm2"),
    Final("1/20", "roget twentieth-float32"),
    Final("1/20", "roget finals finals-twentieth"),
    Final("1/20", "reviews twentieth-float32", "lora, 1e-3", HEAD),
    Final("1/20", "spelling twentieth-float32 twentieth-spelling"),
    Final("1/20", "sums twentieth-float32 twentieth-smollm2"),
    Final("1/20", "kinship twentieth-float32 twentieth-smollm2"),
)


def main() -> None:
    """Print a Markdown table with a line for each row of each stage that has been run."""
    print("| share | stages | row | seeds | rate | loss | minus random | minus LoRA of a lower rank | minus LoRA |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for final in FINALS:
        for line in stage(final):
            print(f"| {final.share} | {final.stages} | {' | '.join(line)} |")


def stage(final: Final) -> Iterator[tuple[str, ...]]:
    """Return the lines of one stage from the records of its bed."""
    bed, *stages = final.stages.split()
    grid = read_grid([HERE / f"beds.yaml#{bed}", *(HERE / f"stages.yaml#{name}" for name in stages)], words=final.words)
    return lines(grid, recorded(grid), final.lora, final.lower)


def lines(grid: Grid, records: Sequence[Record], lora: str, lower: str) -> Iterator[tuple[str, ...]]:
    """Yield label, seeds, rate, loss and the differences of each row with a run.

    They are from random sites, from the first row whose label begins with ``lower`` and from ``lora``, all with the
    row's own precision.
    """
    known = by_key(records)
    losses = {row.label: by_seed(grid, row, known) for row in grid.rows}
    random = next(label for label in losses if label.partition(",")[0] == "random0")
    low_rank = next((label for label in losses if label.startswith(lower)), "")
    for row in grid.rows:
        own, choice = losses[row.label], grid.chosen(row, known)
        if own and choice:
            loss = mean_and_error(list(own.values()), lower=True)
            gains = (_gain(row.label, other, losses) for other in (random, low_rank, lora))
            yield row.label, str(len(own)), choice_text(choice), loss, *gains


def _gain(label: str, other: str, losses: Mapping[str, Mapping[int, float]]) -> str:
    """Mean and standard error of the difference; empty where there is none."""
    found = [] if label == other else differences(losses[label], [losses.get(other, {})])
    return mean_and_error(found, lower=True, sign=True) if found else ""


if __name__ == "__main__":
    main()
