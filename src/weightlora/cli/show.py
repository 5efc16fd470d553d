"""``weightlora show``: a plan or an adapter directory as a table and a heat map."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "show", help="show a plan or an adapter directory", epilog="example: weightlora show runs/demo/plan.json"
    )
    parser.add_argument("path", type=Path, help="plan.json, or a directory that PEFT saved an adapter into")
    parser.add_argument("--png", type=Path, help="also write the heat map as a PNG")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print what the plan keeps, where, and how it was found."""
    from rich.console import Console

    from weightlora.errors import require_extra
    from weightlora.plan.from_adapter import read_adapter
    from weightlora.plan.plan import AdapterPlan
    from weightlora.report.coverage import fast_gaps, fast_text
    from weightlora.report.heatmap import draw_heatmap, terminal_heatmap

    if arguments.png:
        require_extra("matplotlib", "plots")
    path: Path = arguments.path
    plan = read_adapter(path) if path.is_dir() else AdapterPlan.load(path)
    console = Console()
    console.print(terminal_heatmap(plan))
    ranks = sorted({entry.r for entry in plan.entries if entry.r > 0})
    console.print(f"adapters    {len(plan.names)} of {len(plan.entries)} sites, rank {', '.join(map(str, ranks))}")
    console.print(
        f"parameters  {plan.parameters:,} ({100 * plan.parameters / plan.lora_parameters:.1f} % of plain LoRA)"
    )
    console.print(f"fast step   {fast_text(*fast_gaps(path, plan))}", soft_wrap=True)
    console.print(f"rule        {plan.rule} {dict(plan.options) or ''} seed {plan.seed}")
    console.print(f"base model  {plan.base_model or 'unnamed'}", soft_wrap=True)
    if arguments.png:
        draw_heatmap(plan, arguments.png)
        console.print(f"wrote       {arguments.png}", soft_wrap=True)
