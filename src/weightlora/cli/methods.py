"""``weightlora methods``: what there is, with its paper; the tasks too."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "methods", help="list the methods, with their papers", epilog="example: weightlora methods --tasks"
    )
    parser.add_argument("--tasks", action="store_true", help="list the tasks of weightlora train instead")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print a registry."""
    from rich.console import Console

    Console().print(_tasks() if arguments.tasks else _methods())


def _methods() -> Any:
    from rich.table import Table

    from weightlora.methods import METHODS

    table = Table("method", "how the budget is spent", "paper")
    for entry in METHODS:
        table.add_row(entry.name, entry.summary, entry.paper)
    return table


def _tasks() -> Any:
    from rich.table import Column, Table

    from weightlora.tasks import TASKS

    table = Table(Column("task", no_wrap=True), "columns", "metrics", Column("data", overflow="fold"))
    for task in TASKS:
        columns, metrics = ", ".join(task.columns.values()), ", ".join(task.metrics)
        table.add_row(task.name, columns, metrics, task.dataset or "your own")
    return table
