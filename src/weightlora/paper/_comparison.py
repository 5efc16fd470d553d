"""The table of a benchmark with the paper's values in brackets."""

from __future__ import annotations

from dataclasses import replace

from weightlora.bench.table import Cell, Table
from weightlora.paper.study import Published

_AVERAGE = "average"


def with_published(table: Table, published: Published) -> Table:
    """Return the table with the paper's value behind ours, on the tasks that the paper has too.

    Where it has none of them, its average over its own tasks is one more column; without an average, each of them is.

    Args:
        table: Of a benchmark; its first column has the labels of the rows.
        published: The paper's values.
    """
    # A loss is no column of the paper's: it is what the rates are chosen by.
    names = ["" if header.endswith(" loss") else header.split()[0] for header in table.header]
    shared = [name for name in names if name in published.columns and name != _AVERAGE]
    if not shared:
        return _beside(table, published)
    columns = {*shared, *([_AVERAGE] if {*published.columns} - {_AVERAGE} == {*shared} else ())}
    header = tuple(
        f"{text} (paper)" if name in columns else text for name, text in zip(names, table.header, strict=True)
    )
    rows = tuple(
        tuple(
            _behind(cell, published.text(row[0].text, name)) if name in columns else cell
            for name, cell in zip(names, row, strict=True)
        )
        for row in table.rows
    )
    return replace(table, header=header, rows=rows)


def _beside(table: Table, published: Published) -> Table:
    """The table with the paper's average in a further column, or all of its columns where it has none."""
    tasks = [column for column in published.columns if column != _AVERAGE]
    names = {task: f"paper, {task}" for task in tasks}
    if _AVERAGE in published.columns:
        names = {_AVERAGE: f"paper, average of {len(tasks)} tasks"}
    rows = tuple((*row, *(Cell(published.text(row[0].text, column) or "–") for column in names)) for row in table.rows)
    return replace(table, header=(*table.header, *names.values()), rows=rows)


def _behind(cell: Cell, value: str) -> Cell:
    return Cell(f"{cell.text} ({value})", cell.place) if value else cell
