"""``weightlora bench``: methods × tasks × budgets × learning rates × seeds → records → a table."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.cli._option_help import example, paragraph
from weightlora.cli._options import recipe_epilog

if TYPE_CHECKING:
    from rich.console import Console

    from weightlora.bench.grid import Grid, Point, Record

TABLES = ("table.md", "table.tex")
_EXAMPLE = "weightlora bench --config benchmarks/table1.yaml --workers 2"


def add_parser(commands: Any) -> None:
    """Add the command; options of a recipe override ``base`` of the file."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="compare methods: records and a table",
        description=paragraph(
            "Run every method, task, budget, learning rate and seed of a YAML file. Each run is a line of "
            "records.jsonl; the same command resumes where it was stopped. --dry_run tells first what it will cost."
        ),
        epilog="\n".join(
            [recipe_epilog(f"{_EXAMPLE} --dry_run"), example(_EXAMPLE), example("weightlora bench merge --help")]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="the YAML file; of several, the later one wins; see docs/guides/methods.md",
    )
    parser.add_argument("--output_dir", type=Path, help="instead of the file's")
    parser.add_argument("--workers", type=int, default=1, help="runs at once on this machine; default: %(default)s")
    parser.add_argument("--ray", action="store_true", help="run on a Ray cluster")
    parser.add_argument(
        "--gpus_per_run",
        type=float,
        default=0,
        metavar="N",
        help="GPUs that Ray gives each run; two runs of 0.5 share one; default: %(default)s",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="time a few steps of each kind of run, print runs, steps, hours and memory, and record nothing",
    )
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
    """Run what is missing; write and print the table. With ``--dry_run`` only print what it would cost."""
    from weightlora.bench.grid import read_grid

    grid = read_grid(
        arguments.config, arguments.output_dir, arguments.rest
    )  # a mistake is told before torch is imported

    from weightlora.bench.differences import make_differences, require_rows
    from weightlora.bench.engine import Where, recorded
    from weightlora.bench.table import to_terminal
    from weightlora.cli._console import PlainConsole
    from weightlora.cli._quiet import quiet_libraries
    from weightlora.runs.files import BENCH, require_output

    console = PlainConsole()
    with quiet_libraries():
        require_rows(grid, arguments.against)  # before hours of runs
        flags: dict[str, Any] = {
            "where": Where(arguments.workers, arguments.ray, arguments.gpus_per_run),
            "retry": arguments.retry,
        }
        if arguments.dry_run:
            print_cost(grid, console, **flags)
            return
        require_output(grid.output_dir, BENCH, TABLES)
        records = recorded(grid) if arguments.table else run_with_progress(grid, console, **flags)
    print_table(grid, records, console, BENCH)
    if arguments.against:
        console.print(to_terminal(make_differences(grid, records, arguments.against)))


def run_with_progress(grid: Grid, console: Console, **flags: Any) -> list[Record]:
    """Run what is missing and print a line for each run; a terminal also shows a live table."""
    from weightlora.bench.engine import log_file, run_grid
    from weightlora.cli._bench_progress import shown_progress

    with shown_progress(console, partial(log_file, grid)) as report:
        return run_grid(grid, report=report, **flags)


def print_cost(grid: Grid, console: Console, **flags: Any) -> None:
    """Time a few steps of each kind of run and print what all of them will cost."""
    from weightlora.bench.dry_run import dry_run
    from weightlora.cli._bench_cost import cost_table, cost_text

    def report(point: Point, done: int, wanted: int) -> None:
        console.print(f"{done}/{wanted} timed: {point.row.label}, {point.row.task}", soft_wrap=True, highlight=False)

    found = dry_run(grid, report=report, **flags)
    if found.kinds:
        console.print(cost_table(found))
    console.print(cost_text(found, on_ray=flags["where"].on_ray), highlight=False)


def print_table(grid: Grid, records: list[Record], console: Console, writer: str) -> None:
    """Write table.md and table.tex, and print the table."""
    from weightlora.bench.engine import log_file
    from weightlora.bench.grid import by_key
    from weightlora.bench.table import make_table, to_latex, to_markdown, to_terminal
    from weightlora.cli._bench_progress import describe
    from weightlora.folders import own_files

    table = make_table(grid, records)
    with own_files(grid.output_dir, writer) as draft:
        for name, text in zip(TABLES, (to_markdown(table), to_latex(table)), strict=True):
            (draft / name).write_text(text, encoding="utf-8")
    console.print(to_terminal(table))
    failed = [record for record in by_key(records).values() if record["status"] == "failed"]
    count = f"{len(records)} records in {grid.output_dir}" + (f", {len(failed)} of them failures" if failed else "")
    console.print(count, soft_wrap=True)
    for record in failed:
        log = log_file(grid, record)
        where = f"; log: {log}" if log.exists() else ""
        console.print(f"failed: {describe(record['options'])}{where}", soft_wrap=True, highlight=False)
