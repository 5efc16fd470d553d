"""``weightlora show``: a plan or an adapter directory as one screen, and where it comes from."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.cli._help import add_command
from weightlora.errors import OptionError, require_extra

if TYPE_CHECKING:
    from rich.table import Table

    from weightlora.plan.plan import AdapterPlan

#: What the options of a selection mean; methods have further ones of their own.
_MEANINGS = {
    "adapters": "limit: at most so many adapters, or this share of them",
    "parameters": "limit: at most so many parameters, or this share of LoRA's",
    "time": "limit: at most this share of LoRA's time",
    "memory": "limit: at most this peak of the device",
    "steps": "batches that score sites",
    "scored": "steps after which the choice was stable, or the most allowed",
    "head_steps": "steps that train a new head first",
    "order": "gates step at the stepped adapters (alternating, the paper) or with them (joint)",
    "threshold_every": "steps between hard thresholds",
    "learning_rate": "learning rate of the scoring",
    "head_learning_rate": "that of a new head in the scoring",
    "gate_lr": "step size of the gates",
    "per": "what is kept or dropped: whole adapters, or single ranks",
    "most_ranks": "ranks that a site keeps at most",
    "draw": "which random order of one seed",
    "fast": "fast step in the scoring, and what its dropout drops",
    "warm_start": "adapters start from the weights of the scoring",
    "begins_training": "these steps are the first of the training",
    "expand": "WeightLoRA+: as many ranks (r·n/K), or parameters, as LoRA has",
    "agreement": "rank correlation of the scores of two halves of the batches",
    "step_time": "measured: share of plain LoRA's step time",
    "step_share": "share of the training's steps",
    "epochs": "of a training that stores what is frozen",
    "run_time": "share of LoRA's time for the whole run, selection and store included",
    "floor_times": "the same with all adapters above 1/6, 1/3, 1/2, 2/3 and 5/6 of the depth",
    "floor_gains": "expected fall of the loss above 0, 1/6, ... in this time, of LoRA's in all of its time",
    "peak_bytes": "counted: peak of the device in bytes",
    "lora_peak_bytes": "that of plain LoRA",
    "lora_rows": "rows at once with which plain LoRA fits, too",
    "lora_rows_peak_bytes": "its peak then",
    "batch_parts": "micro-batches that take the place of one",
}
#: Endings of a picture's name, which decide its format.
_PICTURES = (".png", ".pdf", ".svg", ".jpg")
#: Columns of a value; a longer one, such as a path, is folded.
_WIDEST = 34


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "show",
        run,
        help="show a plan or an adapter directory",
        description="Print which layers carry an adapter, how many parameters that is, and how they were chosen.",
        examples=["weightlora show runs/demo/plan.json"],
    )
    parser.add_argument("path", type=Path, help="plan.json, or a directory that PEFT saved an adapter into")
    parser.add_argument("--png", type=Path, help="also write the heat map as a PNG; needs weightlora[report]")
    parser.add_argument("--knee", type=Path, help="also write the knee plot of the scores as a PNG; needs the same")


def run(arguments: argparse.Namespace) -> None:
    """Print what the plan keeps, where, and how it was found."""
    from weightlora.cli._screen import PlainConsole
    from weightlora.plan.heatmap import draw_heatmap
    from weightlora.plan.plan import AdapterPlan, read_adapter
    from weightlora.report.knee import draw_knee, knee_text, make_knee

    path: Path = arguments.path
    if arguments.png or arguments.knee:
        require_extra("matplotlib", "report")
    for option, picture in (("--png", arguments.png), ("--knee", arguments.knee)):
        if picture is not None and picture.suffix.lower() not in _PICTURES:
            raise OptionError(f"{option} {picture} is not allowed: give a name that ends with {', '.join(_PICTURES)}")
    plan = read_adapter(path) if path.is_dir() else AdapterPlan.load(path)
    knee = make_knee(plan) if arguments.knee else None  # without scores nothing is printed but the error
    console = PlainConsole()
    console.print(str(plan), highlight=False)
    console.print(_table([*_origin(plan), *_options(plan)]))
    if arguments.png:
        draw_heatmap(plan, arguments.png)
        console.print(f"wrote {arguments.png}", soft_wrap=True)
    if knee is not None:
        draw_knee(knee, arguments.knee)
        console.print(knee_text(knee))
        console.print(f"wrote {arguments.knee}", soft_wrap=True)


def _table(rows: Sequence[tuple[str, str, str]]) -> Table:
    """Name, value and meaning."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Column, Table

    value = Column("value", width=min(_WIDEST, max(len(value) for _, value, _ in rows)), overflow="fold")
    table = Table(Column("from", min_width=15, no_wrap=True), value, "meaning", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(*row)
    return table


def _origin(plan: AdapterPlan) -> Iterator[tuple[str, str, str]]:
    yield "rule", plan.rule, _rule_text(plan)
    yield "seed", str(plan.seed), "random numbers of the selection"
    yield "base model", plan.base_model or "unnamed", "model that the plan was made for"


def _rule_text(plan: AdapterPlan) -> str:
    from weightlora.methods import METHODS
    from weightlora.selection.rules import RULES

    texts = {
        "adapter": "the adapter's files do not say how its sites were chosen",
        **{entry.name: f"method: {entry.summary}" for entry in METHODS},
        **{entry.name: f"score: {entry.summary}" for entry in RULES},
    }
    return texts.get(plan.rule, "how sites were chosen")


def _options(plan: AdapterPlan) -> Iterator[tuple[str, str, str]]:
    for name, value in plan.options.items():
        yield name, _text(value), _MEANINGS.get(name, f"option of {plan.rule}")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return "none" if value is None else str(value)
