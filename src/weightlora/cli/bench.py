"""``weightlora bench``: methods × tasks × budgets × learning rates × seeds → records → a table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from weightlora.bench.engine import Report
    from weightlora.bench.grid import Record


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="compare methods: records and a table",
        description="Run every method, task, budget, learning rate and seed of a YAML file. Each run is a line of "
        "records.jsonl; the same command goes on where it was stopped.",
        epilog="example: weightlora bench --config benchmarks/table1.yaml --workers 2",
    )
    parser.add_argument("--config", type=Path, required=True, help="the YAML file; see docs/bench.md")
    parser.add_argument("--output_dir", type=Path, help="instead of the file's")
    parser.add_argument("--workers", type=int, default=1, help="runs at once on this machine; default: %(default)s")
    parser.add_argument("--ray", action="store_true", help="run on a Ray cluster")
    parser.add_argument("--retry", action="store_true", help="run again what failed")
    parser.add_argument("--table", action="store_true", help="only write and print the table of what is recorded")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run what is missing; write and print the table."""
    from rich.console import Console

    from weightlora.bench.engine import recorded, run_grid
    from weightlora.bench.grid import read_grid
    from weightlora.bench.table import make_table, to_latex, to_markdown, to_terminal
    from weightlora.cli._quiet import quiet_libraries
    from weightlora.files import write_text

    console = Console()
    with quiet_libraries():
        grid = read_grid(arguments.config, arguments.output_dir)
        if arguments.table:
            records = recorded(grid)
        else:
            report = _reporter(console)
            records = run_grid(
                grid, workers=arguments.workers, on_ray=arguments.ray, retry=arguments.retry, report=report
            )
    table = make_table(grid, records)
    write_text(grid.output_dir / "table.md", to_markdown(table))
    write_text(grid.output_dir / "table.tex", to_latex(table))
    console.print(to_terminal(table))
    failed = sum(record["status"] == "failed" for record in records)
    console.print(f"{len(records)} records in {grid.output_dir}" + (f", {failed} of them failures" if failed else ""))


def _reporter(console: Console) -> Report:
    """A line a run; the bar of a terminal would say less."""

    def report(record: Record, done: int, wanted: int) -> None:
        options = record["options"]
        budget = f" keep {options['keep']}" if "keep" in options else ""
        if record["status"] == "ok":
            numbers = ", ".join(f"{name} {value:.4f}" for name, value in record["metrics"].items())
            end = f"{numbers}, {record['selection_seconds'] + record['training_seconds']:.0f} s"
        else:
            end = f"failed: {record['error']}"
        run = (
            f"{options['task']}, {options['method']}{budget}, rate {options['learning_rate']:g}, seed {options['seed']}"
        )
        console.print(f"{done}/{wanted} {run}: {end}", soft_wrap=True, highlight=False)

    return report
