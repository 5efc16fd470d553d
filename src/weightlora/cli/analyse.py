"""``weightlora analyse dot-product``: the paper's Figure 2 on your model, and how far a plan agrees with it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from weightlora.cli._help import add_command

if TYPE_CHECKING:
    from weightlora.runs.recipe import Recipe


def add_parser(commands: Any) -> None:
    """Add the command; its options are those of ``weightlora train``."""
    asked = "weightlora analyse dot-product --task rotten_tomatoes --adapters 0.5 --steps 5"
    text = "look into a model: what single adapters would move"
    parser = add_command(commands, "analyse", run, help=text, examples=[asked])
    studies = parser.add_subparsers(dest="study", required=True, metavar="study")
    add_command(
        studies,
        "dot-product",
        run,
        help="the paper's Figure 2: adapters trained alone, along the frozen model's gradient",
        description=(
            "Train the adapter of each site alone for --steps batches and take its dot product with the frozen "
            "model's gradient (section 2.1 of the paper); then compare the largest with the plan of the recipe, given "
            "by --plan or chosen on the spot. Writes dot_product.json and dot_product.png."
        ),
        examples=[f"{asked} --output_dir runs/dot"],
        recipe=True,
        config=True,
    )


def run(arguments: argparse.Namespace) -> None:
    """Look, write numbers and picture, then print both."""
    from weightlora.runs.recipe import read_recipe

    look(read_recipe(arguments.config, arguments.rest, output_dir="runs/dot_product"), ("png",))


def look(recipe: Recipe, formats: Sequence[str]) -> None:
    """Run the study of a recipe; write its numbers and a picture of each format, then print both."""
    from weightlora.cli._screen import PlainConsole
    from weightlora.cli._streams import quiet_libraries
    from weightlora.files import only_writer, write_json, written
    from weightlora.folders import own_files
    from weightlora.runs.files import ANALYSE, require_output
    from weightlora.runs.gradient_study import dot_product_study, draw_bars, overlap_text, terminal_bars

    output = recipe.output_dir
    names = [f"dot_product.{ending}" for ending in ("json", *formats)]
    with only_writer(output), written(output):
        require_output(output, ANALYSE, names)
        with quiet_libraries():
            found = dot_product_study(recipe)
        with own_files(output, ANALYSE) as draft:
            write_json(draft / names[0], {**found.to_json(), "settings": dict(recipe.settings)})
            for name in names[1:]:
                draw_bars(found, draft / name)
    numbers, *pictures = (output / name for name in names)
    console = PlainConsole()
    console.print(terminal_bars(found))
    console.print(overlap_text(found), soft_wrap=True)
    console.print(f"wrote {numbers} and {' and '.join(map(str, pictures))}", soft_wrap=True)
