"""What ``weightlora bench`` shows while it runs, and before."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from weightlora.bench.dry_run import DryRun, Kind
from weightlora.bench.engine import Progress
from weightlora.cli.bench import cost_table, cost_text, progress_table, shown_progress


def test_the_live_table_counts_and_names_what_is_running():
    running = tuple({"task": "rte", "method": "lora", "learning_rate": 1e-3, "seed": seed} for seed in range(10))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(progress_table(Progress(None, 12, 40, 1, running, 1000.0), passed=100.0))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert ["12", "10", "1", "18", "15", "min"] in [line.split() for line in lines]
    assert sum("rte, lora" in line for line in lines) == 8
    assert "  and 2 more" in lines
    console.print(progress_table(Progress(None, 0, 40, 0, running[:1], None), passed=100.0))
    assert ["0", "1", "0", "39", "–"] in [line.split() for line in console.export_text().splitlines()]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_the_live_table_and_a_file_lines_alone(terminal):
    options = {"task": "rte", "method": "lora", "learning_rate": 1e-3, "seed": 0}
    done = {"options": options, "status": "ok", "metrics": {"loss": 1.0}, "selection_seconds": 1, "training_seconds": 2}
    console = Console(width=80, force_terminal=terminal, file=io.StringIO())
    with shown_progress(console, lambda _: Path("log.txt")) as report:
        report(Progress(None, 0, 2, 0, (options,), None))
        report(Progress(done, 1, 2, 0, (options,), 60.0))
        report(Progress({**done, "status": "failed", "error": "E"}, 2, 2, 1, (), 0.0))
    said = console.file.getvalue()
    assert "1/2 rte, lora, rate 0.001, seed 0: loss 1.0000, 3 s\n" in said
    assert "2/2 rte, lora, rate 0.001, seed 0: failed: E; log: log.txt\n" in said
    assert ("time left" in said) == terminal
    assert terminal or said.count("\n") == 2


def test_the_text_adds_up():
    kinds = (Kind("lora", "rte", 3, 80, 600.0, 2_000_000_000), Kind("full", "rte", 1, 0, 0.0, 0, error="OutOfMemory"))
    found = DryRun(kinds, recorded=12, slots=2, seconds=1200.0)
    said = cost_text(found, on_ray=False)
    assert "12 of 16 runs have records" in said
    assert "0.33 hours (20 min)" in said
    assert "Peak memory of 2 runs at once: 4.00 GB" in said
    assert "full, rte failed and is not counted: OutOfMemory" in said
    assert found.steps == 240
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(cost_table(found))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["lora", "3", "240", "10", "min", "30", "min", "2.00", "GB"] in lines
    assert ["full", "1", "failed", "–", "–", "–"] in lines
    assert ["all", "4", "240"] in lines
