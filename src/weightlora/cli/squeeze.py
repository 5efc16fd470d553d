"""``weightlora squeeze``: a trained adapter with fewer ranks, within one budget over all layers."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.cli._help import add_command
from weightlora.errors import OptionError
from weightlora.plan.limits import read_limit
from weightlora.validation import Count, Share, checked

if TYPE_CHECKING:
    from rich.table import Table

    from weightlora.serving.squeeze import Squeezed


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "squeeze",
        run,
        help="cut a trained adapter to fewer ranks, within one budget over all layers",
        description=(
            "Write a trained LoRA adapter with fewer ranks, as stock PEFT. The singular directions of all layers "
            "compete for one budget, each at the parameters that it takes. Neither base model nor data are needed. "
            "Give at least one limit; all of them hold. With rows, given by the options of a recipe, the directions "
            "are weighted by the inputs of their layer, and the metrics before and after are printed."
        ),
        examples=[
            "weightlora squeeze runs/sums/adapter --max_rank 16 --parameters 0.25 --output_dir small",
            "weightlora squeeze adapter --error 0.05 --output_dir small --task text_classification "
            "--train_file train.csv --validation_file more.csv",
        ],
        recipe=True,
    )
    parser.add_argument("adapter", type=Path, help="a LoRA adapter's folder, as PEFT saves it, or a run's")
    parser.add_argument("--parameters", help="at most so many parameters in A and B, or this share of the adapter's")
    parser.add_argument("--max_rank", help="the largest rank of a layer, such as a server's limit")
    parser.add_argument("--file_size", help="the largest adapter_model.safetensors, such as 10MB")
    parser.add_argument("--error", help="share of the updates' squared norm that may be lost, such as 0.05")
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="the new directory; an earlier squeeze in it is replaced"
    )
    parser.add_argument("--batches", default="16", help="with rows: batches that weight the directions; default: 16")


def run(arguments: argparse.Namespace) -> None:
    """Write the directory; print ranks before and after, what is lost, and what comes next."""
    from weightlora.cli._screen import PlainConsole
    from weightlora.runs.files import adapter_in
    from weightlora.serving.squeeze import squeeze

    folder, limits, metrics = adapter_in(arguments.adapter), _limits(arguments), []
    if arguments.rest:
        squeezed, *metrics = _with_rows(arguments, folder, limits)
    else:
        squeezed = squeeze(folder, arguments.output_dir, **limits)
    console = PlainConsole()
    console.print(_table(squeezed))
    changes = [f"{name} {old:.4g} → {metrics[1][name]:.4g}" for name, old in (metrics[0] if metrics else {}).items()]
    for line in (*changes, *_lines(squeezed)):
        console.print(line, highlight=False, soft_wrap=True)


def _with_rows(
    arguments: argparse.Namespace, folder: Path, limits: Mapping[str, Any]
) -> tuple[Squeezed, dict[str, float], dict[str, float]]:
    """Squeeze for the rows of a recipe.

    Raises:
        OptionError: The options name no rows, or one of them does not fit.
    """
    from tempfile import TemporaryDirectory

    from weightlora.cli._streams import quiet_libraries
    from weightlora.runs.recipe import read_recipe
    from weightlora.runs.squeeze import squeeze_on
    from weightlora.serving.adapter import base_name, read_files

    batches = checked(Count, arguments.batches, "batches", strict=False)
    with TemporaryDirectory() as scratch:  # the trainer has a folder of its own
        base = base_name(read_files(folder))
        named = {"model_name_or_path": base} if base else {}
        recipe = read_recipe({**named, "report_to": "none"}, arguments.rest, output_dir=scratch)
        if not recipe.given & {"task", "train_file", "dataset_name"}:
            raise OptionError(f"{arguments.rest[0]} is for rows; give --task, with --train_file where it has no rows")
        with quiet_libraries():
            return squeeze_on(recipe, folder, arguments.output_dir, batches=batches, **limits)


def _limits(arguments: argparse.Namespace) -> dict[str, Any]:
    """The limits as ``squeeze`` takes them.

    Raises:
        OptionError: One is no number.
    """
    kinds = {"max_rank": Count, "error": Share}
    numbers = {name: getattr(arguments, name) for name in kinds}
    return {
        "parameters": None if arguments.parameters is None else read_limit("parameters", arguments.parameters),
        "file_size": arguments.file_size,
        **{n: text if text is None else checked(kinds[n], text, n, strict=False) for n, text in numbers.items()},
    }


def _table(squeezed: Squeezed) -> Table:
    """A row for each layer, a column for each projection."""
    from rich.box import SIMPLE
    from rich.table import Table

    from weightlora.plan.heatmap import make_heatmap

    grid = make_heatmap(squeezed.plan)
    table = Table(caption="rank before→after, lost share of the squared norm", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("layer", justify="right", no_wrap=True)
    for column in grid.columns:
        table.add_column(column.replace(".", "\n"), justify="right", vertical="bottom")
    for name, cells in zip(grid.rows, grid.cells, strict=True):
        entries = [None if cell is None else cell.entry for cell in cells]
        shown = [f"{e.lora_r}→{e.r} {squeezed.errors[e.site.name]:.0%}" if e else "" for e in entries]
        table.add_row(name, *shown)
    return table


def _lines(squeezed: Squeezed) -> tuple[str, ...]:
    from weightlora.plan.plan import ADAPTER_FILES

    plan, size = squeezed.plan, (squeezed.folder / ADAPTER_FILES[1]).stat().st_size
    ranks = [rank for rank in plan.ranks.values() if rank]
    share = plan.parameters / plan.lora_parameters
    return (
        f"wrote {squeezed.folder}: {plan.parameters:,} of {plan.lora_parameters:,} parameters ({share:.1%}), "
        f"{size / 1e6:.1f} MB",
        f"ranks {min(ranks)} to {max(ranks)} on {len(ranks)} of {len(plan.entries)} layers; "
        f"{squeezed.error:.2%} of the squared norm is lost",
        f"next: weightlora check {squeezed.folder} --for all",
    )
