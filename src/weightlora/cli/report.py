"""``weightlora report``: one HTML page about runs, to look at and to share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from weightlora.cli._help import add_command


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "report",
        run,
        help="one HTML page about runs: sites, scores, curves, costs",
        description=(
            "Write a page that needs no server: which layers carry an adapter and their scores, the share of the "
            "gain, the history of the scores, training curves side by side, costs, what differs between plans, and "
            "how to repeat each run. Needs weightlora[report]."
        ),
        examples=["weightlora report runs/a runs/b --output report.html"],
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="run", help="a run's folder, an adapter or a plan.json")
    parser.add_argument("--output", type=Path, required=True, help="the page")


def run(arguments: argparse.Namespace) -> None:
    """Write the page."""
    from weightlora.cli._screen import PlainConsole
    from weightlora.report.page import write_page

    write_page(arguments.runs, arguments.output)
    size = arguments.output.stat().st_size / 1e6
    PlainConsole().print(f"wrote {arguments.output} ({size:.1f} MB)", highlight=False, soft_wrap=True)
