"""``weightlora train``: a recipe → plan, trained stock adapter, metrics; the same command resumes."""

from __future__ import annotations

import argparse
from typing import Any

from weightlora.cli._options import add_recipe_parser


def add_parser(commands: Any) -> None:
    """Add the command; its options are those of a recipe and of transformers' TrainingArguments."""
    parser = add_recipe_parser(
        commands,
        "train",
        help="train a recipe: plan, stock adapter, metrics",
        description="Train a recipe. Every option can be in the YAML file or here, where it wins; the same command "
        "resumes an interrupted run.",
        command="weightlora train --task rotten_tomatoes --keep 0.5 --learning_rate 2e-3",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Train, then print the heat map and the metrics."""
    from weightlora.errors import require_extra
    from weightlora.runs.recipe import read_recipe

    require_extra("matplotlib", "report")  # before the work begins
    recipe = read_recipe(arguments.config, arguments.rest)  # a mistake is told before torch is imported

    from weightlora.cli._console import PlainConsole
    from weightlora.cli._quiet import quiet_libraries
    from weightlora.model.distributed import is_first
    from weightlora.plan.heatmap import draw_heatmap, terminal_heatmap
    from weightlora.plan.plan import AdapterPlan
    from weightlora.runs.files import ADAPTER
    from weightlora.runs.train import HEATMAP_FILE, train
    from weightlora.trainer.guard import PLAN_FILE

    with quiet_libraries():
        results = train(recipe)
    if not is_first():
        return
    console = PlainConsole()
    plan = AdapterPlan.load(recipe.output_dir / ADAPTER / PLAN_FILE)
    draw_heatmap(plan, recipe.output_dir / HEATMAP_FILE)
    console.print(terminal_heatmap(plan))
    for name, value in results["metrics"].items():
        console.print(f"{name:<28} {value:.4f}")
    console.print(f"wrote {recipe.output_dir}", soft_wrap=True)
