"""``weightlora methods``: the methods with their papers, the rules, or the tasks."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from weightlora.cli._help import add_command

if TYPE_CHECKING:
    from rich.table import Table


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "methods",
        run,
        help="list the methods with their papers, the rules or the tasks",
        description="List the methods of weightlora train with their papers.",
        examples=["weightlora methods --tasks"],
    )
    lists = parser.add_mutually_exclusive_group()
    lists.add_argument("--rules", action="store_true", help="list the rules that score sites instead")
    lists.add_argument("--tasks", action="store_true", help="list the tasks instead")


def run(arguments: argparse.Namespace) -> None:
    """Print a registry."""
    from weightlora.cli._screen import PlainConsole

    console = PlainConsole()
    if arguments.tasks:
        console.print(_table("task", "metrics, columns and data", _tasks()))
    elif arguments.rules:
        console.print(_table("rule", "what a site's score is, and the rule's settings", _rules()))
    else:
        console.print(_table("method", "how the budget is spent, and the paper", _methods()))


def _table(name: str, text: str, rows: Iterable[tuple[str, ...]]) -> Table:
    """Names, each with a line of text and further lines, indented and dim."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Column, Table
    from rich.text import Text

    table = Table(Column(name, no_wrap=True), Column(text, overflow="fold"), box=SIMPLE_HEAD)
    for key, first, *further in rows:
        table.add_row(key, Text("\n").join([Text(first), *(Text(f"  {line}", style="dim") for line in further)]))
    return table


def _methods() -> Iterator[tuple[str, ...]]:
    from weightlora.methods import METHODS

    for entry in METHODS:
        yield entry.name, entry.summary, entry.paper


def _rules() -> Iterator[tuple[str, ...]]:
    from weightlora.selection.rules import RULES, rule_of, settings_of

    for entry in RULES:
        settings = (f"{key}={value}" for key, value in settings_of(rule_of(entry.name)).items())
        yield entry.name, entry.summary, *filter(None, [", ".join(settings)])


def _tasks() -> Iterator[tuple[str, ...]]:
    from weightlora.tasks import TASKS

    for task in TASKS:
        columns = f"columns: {', '.join(task.columns.values())}"
        yield task.name, ", ".join(task.metrics), columns, f"data: {task.dataset or 'your own'}"
