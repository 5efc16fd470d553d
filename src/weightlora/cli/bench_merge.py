"""``weightlora bench merge``: the records of several machines in one folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from weightlora.cli._help import add_command


def add_parser(commands: Any) -> None:
    """Add the command, whose name is two words."""
    parser = add_command(
        commands,
        "bench merge",
        run,
        help="put the records of several machines together",
        description=(
            "Write the records of several benchmark folders into one. A run that two folders have is kept once; "
            "different results of the same run are an error, and so are different revisions or versions."
        ),
        examples=["weightlora bench merge runs/here runs/there --output_dir runs/both"],
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="a benchmark's output_dir")
    parser.add_argument(
        "--output_dir", type=Path, required=True, metavar="FOLDER", help="where records.jsonl is written"
    )
    parser.add_argument(
        "--mixed_revisions",
        action="store_true",
        help="merge records of different git revisions or versions; the table's caption names them",
    )


def run(arguments: argparse.Namespace) -> None:
    """Merge, and say what to do next."""
    from weightlora.bench.records import merge_records, write_merged
    from weightlora.cli._screen import PlainConsole

    records = merge_records(arguments.folders, mixed_revisions=arguments.mixed_revisions)
    write_merged(records, arguments.output_dir, arguments.folders)
    failed = sum(record["status"] == "failed" for record in records)
    PlainConsole().print(
        f"{len(records)} records in {arguments.output_dir}" + (f", {failed} of them failures" if failed else ""),
        soft_wrap=True,
    )
