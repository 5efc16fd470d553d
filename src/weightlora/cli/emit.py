"""``weightlora emit``: a plan in the configuration of another training stack."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from weightlora.cli._help import add_command


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "emit",
        run,
        help="write a plan as the configuration of TRL, Axolotl, LLaMA-Factory and others",
        description=(
            "Print a plan in the configuration of a training stack: exactly its sites, ranks and alphas. Where the "
            "stack's options cannot express it, --output_dir gets an adapter directory that the stack continues from."
        ),
        examples=["weightlora emit runs/select/plan.json --for axolotl"],
    )
    parser.add_argument("plan", type=Path, help="a plan.json")
    parser.add_argument("--for", dest="stack", required=True, help="a training stack such as trl or axolotl")
    parser.add_argument("--output_dir", type=Path, help="a new folder for the file; default: print it")


def run(arguments: argparse.Namespace) -> None:
    """Print the text, or where the files are."""
    from weightlora.plan.plan import AdapterPlan
    from weightlora.stacks.emit import emit

    text = emit(AdapterPlan.load(arguments.plan), arguments.stack, arguments.output_dir)
    if arguments.output_dir is None:
        print(text, end="")
    else:
        from weightlora.cli._screen import PlainConsole

        names = " and ".join(sorted(path.name for path in arguments.output_dir.glob("[!.]*")))
        PlainConsole().print(f"wrote {names} in {arguments.output_dir}", highlight=False, soft_wrap=True)
