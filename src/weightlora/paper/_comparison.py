"""The table of a benchmark with the paper's values in brackets."""

from __future__ import annotations

from dataclasses import replace

from weightlora.bench.table import Cell, Table
from weightlora.paper.study import Published

_AVERAGE = "average"


def with_published(table: Table, published: Published) -> Table:
    """Return the table with the paper's value behind ours, on the tasks that the paper has too.

    Where it has none of them, its average over its own tasks is one more column.

    Args:
        table: Of a benchmark; its first column has the labels of the rows.
        published: The paper's values.
    """
    # A loss is no column of the paper's: it is what the rates are chosen by.
    names = ["" if header.endswith(" loss") else header.split()[0] for header in table.header]
    shared = [name for name in names if name in published.columns and name != _AVERAGE]
    if not shared:
        return _with_average(table, published)
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


def _with_average(table: Table, published: Published) -> Table:
    """One more column, with the paper's average."""
    if _AVERAGE not in published.columns:
        return table
    tasks = [column for column in published.columns if column != _AVERAGE]
    header = (*table.header, f"paper, average of {len(tasks)} tasks")
    texts = [published.text(row[0].text, _AVERAGE) or "–" for row in table.rows]
    return replace(
        table, header=header, rows=tuple((*row, Cell(text)) for row, text in zip(table.rows, texts, strict=True))
    )


def _behind(cell: Cell, value: str) -> Cell:
    return Cell(f"{cell.text} ({value})", cell.place) if value else cell
