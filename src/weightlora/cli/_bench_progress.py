"""What ``weightlora bench`` shows while it runs: a line for each run that ends, and on a terminal a live table."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.cli._durations import duration

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rich.console import Console, Group

    from weightlora.bench.engine import Progress
    from weightlora.bench.grid import Record

#: Of the runs that are running, so many are named.
_NAMED = 8


@contextmanager
def shown_progress(console: Console, log_of: Callable[[Record], Path]) -> Generator[Callable[[Progress], None]]:
    """Yield a report for :func:`weightlora.bench.engine.run_grid`.

    Args:
        console: Where the lines go; the table is shown if it is a terminal.
        log_of: Returns the log of a failed run.
    """
    from rich.live import Live

    last: list[tuple[Progress, float]] = []

    def shown() -> Group | str:
        return progress_table(last[-1][0], time.monotonic() - last[-1][1]) if last else ""

    def report(progress: Progress) -> None:
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
    """Return a run as text, such as ``rte, weightlora keep 5, rate 0.001, seed 0``."""
    budget = f" keep {options['keep']}" if "keep" in options else ""
    rate = f"rate {options['learning_rate']:g}"
    return f"{options['task']}, {options['method']}{budget}, {rate}, seed {options['seed']}"


def progress_table(progress: Progress, passed: float) -> Group:
    """Return the table: done, running, failed, left, time left, and what is running.

    Args:
        progress: The last report.
        passed: Seconds since then.
    """
    from rich.box import SIMPLE
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from weightlora.text import printable

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
