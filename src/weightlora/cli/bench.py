"""``weightlora bench``: methods × tasks × budgets × learning rates × seeds → records → a table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.cli._option_help import paragraph
from weightlora.cli._options import recipe_epilog

if TYPE_CHECKING:
    from rich.console import Console

    from weightlora.bench.grid import Grid, Record


def add_parser(commands: Any) -> None:
    """Add the command; options of a recipe override ``base`` of the file."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="compare methods: records and a table",
        description=paragraph(
            "Run every method, task, budget, learning rate and seed of a YAML file. Each run is a line of "
            "records.jsonl; the same command resumes where it was stopped."
        ),
        epilog=recipe_epilog("weightlora bench --config benchmarks/table1.yaml --workers 2"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="the YAML file; of several, the later one wins; see docs/guides/benchmarks.md",
    )
    parser.add_argument("--output_dir", type=Path, help="instead of the file's")
    parser.add_argument("--workers", type=int, default=1, help="runs at once on this machine; default: %(default)s")
    parser.add_argument("--ray", action="store_true", help="run on a Ray cluster")
    parser.add_argument("--retry", action="store_true", help="run again what failed")
    parser.add_argument("--table", action="store_true", help="only write and print the table of what is recorded")
    parser.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="ROW",
        help="also print differences to these rows' mean, paired by seed",
    )
    parser.set_defaults(run=run, takes_recipe=True)


def run(arguments: argparse.Namespace) -> None:
    """Run what is missing; write and print the table."""
    from weightlora.bench.differences import make_differences, require_rows
    from weightlora.bench.engine import recorded
    from weightlora.bench.grid import read_grid
    from weightlora.bench.table import to_terminal
    from weightlora.cli._console import PlainConsole
    from weightlora.cli._quiet import quiet_libraries

    console = PlainConsole()
    with quiet_libraries():
        grid = read_grid(arguments.config, arguments.output_dir, arguments.rest)
        require_rows(grid, arguments.against)  # before hours of runs
        if arguments.table:
            records = recorded(grid)
        else:
            flags = {"workers": arguments.workers, "on_ray": arguments.ray, "retry": arguments.retry}
            records = run_with_progress(grid, console, **flags)
    print_table(grid, records, console)
    if arguments.against:
        console.print(to_terminal(make_differences(grid, records, arguments.against)))


def run_with_progress(grid: Grid, console: Console, **flags: Any) -> list[Record]:
    """Run what is missing and print a line for each run; a terminal also shows a bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from weightlora.bench.engine import run_grid

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("runs", total=None)

        def report(record: Record | None, done: int, wanted: int) -> None:
            progress.update(bar, completed=done, total=wanted)
            if record is not None:
                console.print(f"{done}/{wanted} {_line(record)}", soft_wrap=True, highlight=False)

        return run_grid(grid, report=report, **flags)


def print_table(grid: Grid, records: list[Record], console: Console) -> None:
    """Write table.md and table.tex, and print the table."""
    from weightlora.bench.table import make_table, to_latex, to_markdown, to_terminal
    from weightlora.files import write_text

    table = make_table(grid, records)
    write_text(grid.output_dir / "table.md", to_markdown(table))
    write_text(grid.output_dir / "table.tex", to_latex(table))
    console.print(to_terminal(table))
    failed = sum(record["status"] == "failed" for record in records)
    console.print(f"{len(records)} records in {grid.output_dir}" + (f", {failed} of them failures" if failed else ""))


def _line(record: Record) -> str:
    options = record["options"]
    budget = f" keep {options['keep']}" if "keep" in options else ""
    if record["status"] == "ok":
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in record["metrics"].items())
        end = f"{numbers}, {record['selection_seconds'] + record['training_seconds']:.0f} s"
    else:
        end = f"failed: {record['error']}"
    run = f"{options['task']}, {options['method']}{budget}, rate {options['learning_rate']:g}, seed {options['seed']}"
    return f"{run}: {end}"
