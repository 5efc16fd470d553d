"""Commands that read a recipe: the same options, help and check for all of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from weightlora.cli._option_help import example, options_help, paragraph
from weightlora.runs.recipe import MethodOptions, ModelOptions, TaskOptions


def add_recipe_parser(commands: Any, name: str, *, help: str, description: str, command: str) -> Any:
    """Add and return a command whose options are those of a recipe; ``main`` leaves them as words."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=paragraph(description),
        epilog=recipe_epilog(command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, help="YAML file of 'option: value' lines")
    parser.set_defaults(takes_recipe=True)
    return parser


def recipe_epilog(command: str) -> str:
    """Return type, default and meaning of the recipe's own options, and an example."""
    own = options_help(ModelOptions, TaskOptions, MethodOptions)
    note = paragraph("Options of the recipe. Those of transformers' TrainingArguments are options too.")
    return f"{note}\n\n{own}\n\n{example(command)}"
