"""``weightlora select``: a recipe → plan.json and its heat map."""

from __future__ import annotations

import argparse
from typing import Any

from weightlora.cli._options import add_recipe_parser


def add_parser(commands: Any) -> None:
    """Add the command; its options are those of ``weightlora train``."""
    parser = add_recipe_parser(
        commands,
        "select",
        help="choose the adapters: plan.json and a heat map",
        description="Run the warm-up of a recipe and write plan.json and heatmap.png into --output_dir (default: "
        "runs/select). The options are those of weightlora train, in the YAML file or here, where they win.",
        command="weightlora select --task text_classification --train_file reviews.csv --keep 0.5",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Select, write the plan and its picture, and print the heat map."""
    from rich.console import Console

    from weightlora.cli._quiet import quiet_libraries
    from weightlora.errors import require_extra
    from weightlora.report.heatmap import draw_heatmap, terminal_heatmap
    from weightlora.runs.recipe import read_recipe
    from weightlora.runs.select import select_plan
    from weightlora.runs.train import HEATMAP_FILE
    from weightlora.trainer.guard import PLAN_FILE

    require_extra("matplotlib", "plots")  # before the work begins
    recipe = read_recipe(arguments.config, arguments.rest, output_dir="runs/select")
    with quiet_libraries():
        plan = select_plan(recipe)
    draw_heatmap(plan, recipe.output_dir / HEATMAP_FILE)
    console = Console()
    console.print(terminal_heatmap(plan))
    if "agreement" in plan.options:
        agreement = plan.options["agreement"]
        console.print(f"two halves of the batches agree on the ranking: Spearman correlation {agreement:.2f}")
    files = [recipe.output_dir / name for name in (PLAN_FILE, HEATMAP_FILE)]
    console.print(f"wrote {files[0]} and {files[1]}", soft_wrap=True)
