"""``weightlora train``: a recipe → plan, trained stock adapter, metrics; the same command resumes."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from weightlora.cli._help import add_command
from weightlora.runs.files import ADAPTER, HEATMAP_FILE, RESULTS_FILE


def add_parser(commands: Any) -> None:
    """Add the command; its options are those of a recipe and of transformers' TrainingArguments."""
    add_command(
        commands,
        "train",
        run,
        help="train a recipe: plan, stock adapter, metrics",
        description=(
            "Train a recipe. Every option can be in the YAML file or here, where it wins; the same command resumes an "
            "interrupted run."
        ),
        examples=["weightlora train --task rotten_tomatoes --adapters 0.5 --learning_rate 2e-3"],
        recipe=True,
        config=True,
    )


def run(arguments: argparse.Namespace) -> None:
    """Train, then print the heat map, the metrics, where the adapter is, and what to do next."""
    from weightlora.runs.recipe import read_recipe

    start = time.perf_counter()
    recipe = read_recipe(arguments.config, arguments.rest)  # a mistake is told before torch is imported

    from weightlora.cli._screen import PlainConsole, draws_pictures, shown_log
    from weightlora.cli._streams import quiet_libraries
    from weightlora.folders import own_files
    from weightlora.model.distributed import is_first
    from weightlora.plan.heatmap import draw_heatmap
    from weightlora.plan.plan import AdapterPlan
    from weightlora.runs.files import TRAIN
    from weightlora.runs.train import train
    from weightlora.selection.progress import ProgressLines
    from weightlora.trainer.guard import PLAN_FILE

    console = PlainConsole()
    done = os.path.exists(recipe.output_dir / RESULTS_FILE)  # noqa: PTH110  # False for a name that is too long
    recipe.training.disable_tqdm = bool(recipe.training.disable_tqdm) or not sys.stderr.isatty()
    lines = () if console.is_terminal else (ProgressLines(partial(console.print, highlight=False)),)
    with quiet_libraries(), shown_log(console):
        results = train(recipe, callbacks=lines)
    if not is_first():
        return
    plan = AdapterPlan.load(recipe.output_dir / ADAPTER / PLAN_FILE)
    if not (recipe.output_dir / HEATMAP_FILE).exists() and draws_pictures(console):
        with own_files(recipe.output_dir, TRAIN) as draft:
            draw_heatmap(plan, draft / HEATMAP_FILE)
    if done:
        console.print("already done: this is what the run left; another output_dir trains again", highlight=False)
    console.print(str(plan), highlight=False)
    for line in _ending(recipe.output_dir, results, None if done else time.perf_counter() - start):
        console.print(line, soft_wrap=True, highlight=False)


def _ending(output: Path, results: Mapping[str, Any], seconds: float | None) -> list[str]:
    """The lines at the end of a run: its metrics, what it cost, where its adapter is, and the next commands."""
    from weightlora.text import duration

    share = results["adapter_parameters"] / results["lora_parameters"]
    rows = {name: f"{value:.4f}" for name, value in results["metrics"].items()}
    rows["parameters"] = f"{results['adapter_parameters']:,} ({100 * share:.0f} % of LoRA's)"
    rows |= {name: f"{results[f'{name}_seconds']:.1f} s" for name in ("selection", "training")}
    if seconds is not None:
        rows["in all"] = f"{duration(seconds)}, with loading and measuring"
    folder, page = (shlex.quote(str(path)) for path in (output, output / "report.html"))
    return [
        *(f"{name:<28} {value}" for name, value in rows.items()),
        f"{'adapter, stock PEFT':<28} {output / ADAPTER}",
        f"next: weightlora report {folder} --output {page}",
        f"      weightlora check {folder} --for all",
    ]
