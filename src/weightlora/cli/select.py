"""``weightlora select``: a recipe → plan.json, its heat map and its knee plot."""

from __future__ import annotations

import argparse
from typing import Any

from weightlora.cli._options import add_recipe_parser


def add_parser(commands: Any) -> None:
    """Add the command; its options are those of ``weightlora train``."""
    parser = add_recipe_parser(
        commands,
        "select",
        help="choose the adapters: plan.json and its plots",
        description="Run the warm-up of a recipe and write plan.json, heatmap.png and, where sites have different "
        "scores, knee.png into --output_dir (default: runs/select). The options are those of weightlora train, in the "
        "YAML file or here, where they win.",
        command="weightlora select --task text_classification --train_file reviews.csv --keep 0.5",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Select, write the plan and its plots, and print the heat map."""
    from weightlora.errors import require_extra
    from weightlora.runs.recipe import read_recipe

    require_extra("matplotlib", "report")  # before the work begins
    # A mistake is told before torch is imported.
    recipe = read_recipe(arguments.config, arguments.rest, output_dir="runs/select")

    from weightlora.cli._console import PlainConsole
    from weightlora.cli._quiet import quiet_libraries
    from weightlora.plan.heatmap import draw_heatmap, terminal_heatmap
    from weightlora.report.knee import draw_knee, has_gain, knee_text, make_knee
    from weightlora.runs.select import select_plan
    from weightlora.runs.train import HEATMAP_FILE, KNEE_FILE
    from weightlora.trainer.guard import PLAN_FILE

    with quiet_libraries():
        plan = select_plan(recipe)
    plan_file, heatmap, knee_file = (recipe.output_dir / name for name in (PLAN_FILE, HEATMAP_FILE, KNEE_FILE))
    draw_heatmap(plan, heatmap)
    knee = make_knee(plan) if has_gain(plan) else None
    if knee is not None:
        draw_knee(knee, knee_file)
    else:
        knee_file.unlink(missing_ok=True)  # an earlier selection's, of another plan
    console = PlainConsole()
    console.print(terminal_heatmap(plan))
    if "agreement" in plan.options:
        agreement = plan.options["agreement"]
        console.print(f"two halves of the batches agree on the ranking: Spearman correlation {agreement:.2f}")
    if knee is not None:
        console.print(knee_text(knee))
        console.print(f"wrote {plan_file}, {heatmap} and {knee_file}", soft_wrap=True)
    else:
        console.print(f"wrote {plan_file} and {heatmap}", soft_wrap=True)
