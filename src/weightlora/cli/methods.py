"""``weightlora methods``: what there is, with its paper."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "methods", help="list the methods, with their papers", epilog="example: weightlora methods"
    )
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> None:
    """Print the registry."""
    from rich.console import Console
    from rich.table import Table

    from weightlora.methods import METHODS

    table = Table("method", "how the budget is spent", "paper")
    for entry in METHODS:
        table.add_row(entry.name, entry.summary, entry.paper)
    Console().print(table)
