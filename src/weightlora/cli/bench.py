"""``weightlora bench``: methods × tasks × limits × learning rates × seeds → records → a table."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.cli._help import add_command
from weightlora.text import printable

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table

    from weightlora.bench.dry_run import DryRun
    from weightlora.bench.engine import BenchProgress
    from weightlora.bench.grid import Grid, Point
    from weightlora.bench.records import Record

#: Of the runs that are running, so many are named.
_NAMED = 8
TABLES = ("table.md", "table.tex")
_EXAMPLE = "weightlora bench --config benchmarks/table1.yaml --workers 2"


def add_parser(commands: Any) -> None:
    """Add the command; options of a recipe override ``base`` of the file."""
    parser = add_command(
        commands,
        "bench",
        run,
        help="compare methods: records and a table",
        description=(
            "Run every method, task, limit, learning rate and seed of a YAML file. Each run is a line of "
            "records.jsonl; the same command resumes where it was stopped. --dry_run tells first what it will cost."
        ),
        examples=[f"{_EXAMPLE} --dry_run", _EXAMPLE, "weightlora bench merge --help"],
        recipe=True,
    )
    parser.add_argument(
        "--config",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="the YAML file, or FILE#NAME for a part of it; of several, the later one wins; see docs/guides/methods.md",
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


def run(arguments: argparse.Namespace) -> None:
    """Run what is missing; write and print the table. With ``--dry_run`` only print what it would cost."""
    from weightlora.bench.grid import read_grid

    grid = read_grid(
        arguments.config, arguments.output_dir, arguments.rest
    )  # a mistake is told before torch is imported

    from weightlora.bench.engine import Where, recorded
    from weightlora.bench.table import make_differences, require_rows, to_terminal
    from weightlora.cli._screen import PlainConsole
    from weightlora.cli._streams import quiet_libraries
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

    with shown_progress(console, partial(log_file, grid)) as report:
        return run_grid(grid, report=report, **flags)


def print_cost(grid: Grid, console: Console, **flags: Any) -> None:
    """Time a few steps of each kind of run and print what all of them will cost."""
    from weightlora.bench.dry_run import dry_run

    def report(point: Point, done: int, wanted: int) -> None:
        console.print(f"{done}/{wanted} timed: {point.row.label}, {point.row.task}", soft_wrap=True, highlight=False)

    found = dry_run(grid, report=report, **flags)
    if found.kinds:
        console.print(cost_table(found))
    console.print(cost_text(found, on_ray=flags["where"].on_ray), highlight=False)


def print_table(grid: Grid, records: list[Record], console: Console, writer: str) -> None:
    """Write table.md and table.tex, and print the table."""
    from weightlora.bench.engine import log_file
    from weightlora.bench.records import by_key
    from weightlora.bench.table import make_table, to_latex, to_markdown, to_terminal
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


# -- while it runs -----------------------------------------------------------------------------------------------------


@contextmanager
def shown_progress(console: Console, log_of: Callable[[Record], Path]) -> Generator[Callable[[BenchProgress], None]]:
    """Yield a report for :func:`weightlora.bench.engine.run_grid`.

    Args:
        console: Where the lines go; the table is shown if it is a terminal.
        log_of: Returns the log of a failed run.
    """
    from rich.live import Live

    last: list[tuple[BenchProgress, float]] = []

    def shown() -> Group | str:
        return progress_table(last[-1][0], time.monotonic() - last[-1][1]) if last else ""

    def report(progress: BenchProgress) -> None:
        last[:] = [(progress, time.monotonic())]
        if progress.record is not None:
            line = f"{progress.done}/{progress.wanted} {_line(progress.record, log_of)}"
            console.print(line, soft_wrap=True, highlight=False)

    if console.is_terminal:
        with Live(get_renderable=shown, console=console, refresh_per_second=2, transient=True):
            yield report
    else:
        yield report


def describe(options: Mapping[str, Any]) -> str:
    """Return a run as text, such as ``rte, weightlora K = 5, rate 0.001, seed 0``."""
    from weightlora.bench.grid import limits_text

    limits = f" {limits_text(options)}".rstrip()
    rate = f"rate {options['learning_rate']:g}"
    return f"{options['task']}, {options['method']}{limits}, {rate}, seed {options['seed']}"


def progress_table(progress: BenchProgress, passed: float) -> Group:
    """Return the table: done, running, failed, left, time left, and what is running.

    Args:
        progress: The last report.
        passed: Seconds since then.
    """
    from rich.box import SIMPLE
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from weightlora.text import duration

    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for name in ("done", "running", "failed", "waiting", "time left"):
        table.add_column(name, justify="right")
    running = progress.running
    waiting = progress.wanted - progress.done - len(running)
    left = "–" if progress.seconds_left is None else duration(max(0.0, progress.seconds_left - passed))
    table.add_row(*map(str, (progress.done, len(running), progress.failed, waiting)), left)
    names = [describe(options) for options in running[:_NAMED]]
    names += [f"and {len(running) - _NAMED} more"] if len(running) > _NAMED else []
    lines = Text(printable("\n".join(f"  {name}" for name in names)), no_wrap=True, overflow="ellipsis")
    return Group(table, lines, "  Ctrl-C stops; the same command continues.")


def _line(record: Record, log_of: Callable[[Record], Path]) -> str:
    if record["status"] == "ok":
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in record["metrics"].items())
        end = f"{numbers}, {record['selection_seconds'] + record['training_seconds']:.0f} s"
    else:
        end = f"failed: {record['error']}; log: {log_of(record)}"
    return f"{describe(record['options'])}: {end}"


# -- before it runs ----------------------------------------------------------------------------------------------------


def cost_table(found: DryRun) -> Table:
    """Return a line for each kind of run, and one for all."""
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    from weightlora.text import duration

    several = len({kind.task for kind in found.kinds}) > 1
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), show_footer=True)
    totals = {"runs": f"{found.runs:,}", "steps": f"{found.steps:,}"}
    for name in ("kind of run", "runs", "steps", "one run", "all", "peak memory"):
        footer = {"kind of run": "all", **totals}.get(name, "")
        table.add_column(name, footer, justify="left" if name == "kind of run" else "right", no_wrap=name == "runs")
    for kind in found.kinds:
        name = printable(f"{kind.label}, {kind.task}" if several else kind.label)
        if kind.error:
            table.add_row(Text(name), f"{kind.runs:,}", "failed", "–", "–", "–")
        else:
            times = duration(kind.seconds), duration(kind.runs * kind.seconds)
            table.add_row(Text(name), f"{kind.runs:,}", f"{kind.runs * kind.steps:,}", *times, _size(kind.peak_bytes))
    return table


def cost_text(found: DryRun, *, on_ray: bool) -> str:
    """Return what the table leaves out: records, time with all workers, memory at once and what failed."""
    from weightlora.text import duration

    total = found.recorded + found.runs
    lines = [f"{found.recorded} of {total} runs have records."]
    if found.runs:
        place = "on the Ray cluster" if on_ray else "on this machine"
        at_once = "1 run at a time" if found.slots == 1 else f"{found.slots} runs at once"
        hours = f"{found.seconds / 3600:.2f} hours" + (f" ({duration(found.seconds)})" if found.seconds < 3600 else "")
        lines.append(f"The other {found.runs} take about {hours} {place}, {at_once}.")
        lines.append(f"Peak memory of {at_once}: {_size(found.peak_bytes)}.")
    failed = [kind for kind in found.kinds if kind.error]
    lines += [printable(f"{kind.label}, {kind.task} failed and is not counted: {kind.error}") for kind in failed]
    return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count else "–"
