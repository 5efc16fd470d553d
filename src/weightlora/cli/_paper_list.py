"""What ``weightlora paper`` lists: every study with its runs, their state and what the rest will cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from weightlora.cli._durations import duration

if TYPE_CHECKING:
    from rich.table import Table

    from weightlora.bench.grid import Grid, Record
    from weightlora.paper.study import Study


@dataclass(frozen=True)
class State:
    """Runs of a study."""

    records: tuple[Record, ...]
    left: int

    @property
    def done(self) -> int:
        """Runs with a record."""
        return len(self.records)

    @property
    def failed(self) -> int:
        """Those whose record is a failure."""
        return sum(record["status"] == "failed" for record in self.records)

    @property
    def text(self) -> str:
        """How many runs have a record."""
        failed = f", {self.failed} of them failures" if self.failed else ""
        return f"{self.done} of {self.done + self.left} runs have records{failed}."


def state_of(grid: Grid) -> State:
    """Return how many runs of a grid have a record; those of other studies in the folder are not counted."""
    from weightlora.bench.engine import recorded
    from weightlora.bench.grid import by_key

    known = by_key(recorded(grid))
    keys = {point.key for point in (*grid.tuning, *grid.tested(known))} & known.keys()
    return State(tuple(known[key] for key in keys), sum(map(len, grid.left(known))))


def listing(folder: Path, output_dir: Path) -> Table:
    """Return a line for each study and size."""
    from rich.box import SIMPLE
    from rich.table import Table

    from weightlora.paper.study import read_study, study_names

    caption = (
        "Cost: one run at a time, from the records, or on a CPU core as the study says. Where it is not known, "
        "--dry_run measures it."
    )
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), caption=caption)
    for name in ("study", "size", "runs", "recorded", "cost of the rest"):
        table.add_column(name, justify="right" if name in ("runs", "recorded") else "left", no_wrap=True)
    table.add_column("what")
    for name in study_names(folder):
        for line in _lines(read_study(name, folder), output_dir):
            table.add_row(*line)
    return table


def _lines(study: Study, output_dir: Path) -> Iterator[tuple[str, ...]]:
    for number, size in enumerate(study.setups):
        kind = study.kind_of(size)
        if kind == "memory":
            cells = ("–", "–", "computed: a minute")
        elif kind == "dot_product":
            found = (output_dir / size / study.name / "dot_product.json").exists()
            cells = ("1", str(int(found)), "–" if found else _cost(1, study.setup(size).seconds_a_run))
        else:
            cells = _grid_cells(study, size, output_dir)
        yield ("" if number else study.name, size, *cells, "" if number else study.title)


def _grid_cells(study: Study, size: str, output_dir: Path) -> tuple[str, str, str]:
    from weightlora.bench.schedule import seconds_left

    grid = study.grid(size, output_dir / size, checked=False)
    state = state_of(grid)
    measured = seconds_left(grid, state.records, 1)
    cost = _cost(state.left, study.setup(size).seconds_a_run) if measured is None else duration(measured)
    return str(state.done + state.left), str(state.done), cost if state.left else "–"


def _cost(runs: int, seconds: float | None) -> str:
    return "not known" if seconds is None else duration(runs * seconds)
