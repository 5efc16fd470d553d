"""A study and its records → a table, a figure, and what must be said of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from weightlora.bench.grid import Grid, Record
from weightlora.bench.table import Table, make_table
from weightlora.paper._comparison import with_published
from weightlora.paper._jaccard import stability
from weightlora.paper._series import heat_maps, lines
from weightlora.paper.picture import Picture
from weightlora.paper.study import Study


@dataclass(frozen=True)
class Results:
    """What is drawn of a study."""

    table: Table
    picture: Picture | None
    """None of a table of the paper, and where there is no record to draw."""
    notes: tuple[str, ...]
    """Where it is in the paper, what the paper says, and what differs here."""

    @property
    def captioned(self) -> Table:
        """The table with all that must be said, for a file."""
        own = f"{self.table.caption.rstrip('.')}." if self.table.caption else ""
        return replace(self.table, caption=" ".join(filter(None, (own, *self.notes))))


def results_of(study: Study, size: str, grid: Grid, records: Sequence[Record]) -> Results:
    """Return the table and figure of a study that trains.

    Args:
        study: A table, curves, heat maps or Jaccard matrices.
        size: Of its set-up.
        grid: Its benchmark.
        records: What there is of it; others are passed over.
    """
    picture: Picture | None = None
    if study.kind == "table":
        table = with_published(make_table(grid, records), study.published)
    elif study.kind == "lines":
        table, picture = lines(study, grid, records, with_points=size == "full")
    elif study.kind == "heat_map":
        table, picture = heat_maps(study, grid, records)
    else:
        table, picture = stability(study, grid, records)
    return Results(table, picture, notes_of(study, size))


def computed_results(study: Study, size: str) -> Results:
    """Return the table and figure of a study that is computed and trains nothing."""
    from weightlora.paper._memory import computed_memory  # loads transformers' models

    return Results(*computed_memory(study, size), notes_of(study, size))


def notes_of(study: Study, size: str) -> tuple[str, ...]:
    """Return where the study is in the paper, what the paper says, and what differs here."""
    published = study.published
    return (
        f"{study.title}: {study.place} of the paper, {size} size.",
        *(["In brackets, or in a column of its own: the paper's values, in per cent."] if published.rows else []),
        *(f"The paper: {statement}." for statement in published.statements),
        f"What differs: {study.setup(size).differs}.",
    )
