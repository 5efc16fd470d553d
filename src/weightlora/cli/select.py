"""``weightlora select``: a recipe → plan.json, its heat map and its knee plot."""

from __future__ import annotations

import argparse
import shlex
import time
from typing import Any

from weightlora.cli._help import add_command


def add_parser(commands: Any) -> None:
    """Add the command; its options are those of ``weightlora train``."""
    add_command(
        commands,
        "select",
        run,
        help="choose the adapters: plan.json and its plots",
        description=(
            "Score the sites of a recipe and write plan.json, heatmap.png and, where sites have different scores, "
            "knee.png into --output_dir (default: runs/select). The options are those of weightlora train, in the "
            "YAML file or here, where they win."
        ),
        examples=["weightlora select --task text_classification --train_file reviews.csv --adapters 0.5"],
        recipe=True,
        config=True,
    )


def run(arguments: argparse.Namespace) -> None:
    """Select, write the plan and its plots, and print the heat map, what was written and what to do next."""
    from weightlora.runs.recipe import read_recipe

    start = time.perf_counter()
    # A mistake is told before torch is imported.
    recipe = read_recipe(arguments.config, arguments.rest, output_dir="runs/select")

    from weightlora.cli._screen import PlainConsole, draws_pictures, shown_log
    from weightlora.cli._streams import quiet_libraries
    from weightlora.folders import own_files, remove_own_file
    from weightlora.plan.heatmap import draw_heatmap
    from weightlora.report.knee import draw_knee, has_gain, make_knee
    from weightlora.runs.files import HEATMAP_FILE, KNEE_FILE, SELECT
    from weightlora.runs.train import select_plan
    from weightlora.text import duration
    from weightlora.trainer.guard import PLAN_FILE

    console = PlainConsole()
    with quiet_libraries(), shown_log(console):
        plan = select_plan(recipe)
    plan_file, heatmap, knee_file = (recipe.output_dir / name for name in (PLAN_FILE, HEATMAP_FILE, KNEE_FILE))
    knee = make_knee(plan) if has_gain(plan) else None
    for file in (heatmap, knee_file):
        remove_own_file(file, SELECT)  # an earlier selection's
    wrote = [plan_file]
    if draws_pictures(console):
        with own_files(recipe.output_dir, SELECT) as draft:
            draw_heatmap(plan, draft / HEATMAP_FILE)
            wrote.append(heatmap)
            if knee is not None:
                draw_knee(knee, draft / KNEE_FILE)
                wrote.append(knee_file)
    console.print(str(plan), highlight=False)
    if "agreement" in plan.options:
        agreement = plan.options["agreement"]
        console.print(f"two halves of the batches agree on the ranking: Spearman correlation {agreement:.2f}")
    whole: dict[str, Any] = {"soft_wrap": True, "highlight": False}
    console.print(f"wrote {', '.join(map(str, wrote))} in {duration(time.perf_counter() - start)}", **whole)
    console.print(f"next: weightlora train --plan {shlex.quote(str(plan_file))}, with the same task and files", **whole)
