"""``weightlora estimate``: what training a plan takes, next to plain LoRA and WeightLoRA+."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.cli._config_memory import add_options, print_memory, require_defaults
from weightlora.errors import OptionError
from weightlora.model.loaders import LOADERS

if TYPE_CHECKING:
    from rich.table import Table

    from weightlora.cost.estimate import Estimate
    from weightlora.plan.plan import AdapterPlan


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "estimate",
        help="memory and step time of a plan, or memory from a config alone",
        description="With a plan: print parameters, memory and step time of LoRA, of the plan and of WeightLoRA+. "
        "Without a plan: print the memory of full fine-tuning, LoRA, WeightLoRA and WeightLoRA+ on one device. That "
        "needs only the model's config.json; nothing is loaded or trained.",
        epilog="example: weightlora estimate runs/demo/plan.json --batch 32x512, or without a plan "
        "weightlora estimate --model_name_or_path Qwen/Qwen3-8B --batch 8x512 --memory 24GB",
    )
    parser.add_argument("path", type=Path, nargs="?", help="plan.json; without it, see the options without a plan")
    parser.add_argument("--batch", required=True, help="rows x tokens, such as 32x512")
    parser.add_argument(
        "--model_name_or_path",
        help="hub name or folder; default: the base model that the plan names. Without a plan also a config.json",
    )
    parser.add_argument(
        "--fast",
        nargs="?",
        const="input",
        choices=("input", "rank"),
        help="three more lines, with the fast LoRA step; its dropout drops elements of the adapter's input (default), "
        "or of the rank-sized activation",
    )
    add_options(parser.add_argument_group("options without a plan"))
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the table."""
    rows, length = _read_batch(arguments.batch)
    if arguments.path is None:
        if arguments.fast:
            raise OptionError("--fast needs a plan; leave it out")
        print_memory(arguments, rows, length)
        return
    require_defaults(arguments)

    from weightlora.cli._console import PlainConsole
    from weightlora.cli._quiet import quiet_libraries
    from weightlora.cost.estimate import estimate
    from weightlora.plan.plan import AdapterPlan

    plan = AdapterPlan.load(arguments.path)
    with quiet_libraries():
        model, make_loss = _model_and_loss(plan, arguments.model_name_or_path or plan.base_model, length)
        lines = estimate(plan, model, make_loss, rows=rows, length=length, fast=arguments.fast)
    console = PlainConsole()
    console.print(_table(lines, f"one training step, {rows} rows of {length} tokens"))
    console.print(_LEGEND, highlight=False)


def _read_batch(text: str) -> tuple[int, int]:
    """Rows and tokens of a row."""
    match = re.fullmatch(r"([1-9][0-9]{0,6})[x×]([1-9][0-9]{0,6})", text)
    if match is None:
        raise OptionError(f"--batch {text!r} is not allowed: give rows x tokens, such as 32x512, each below 10,000,000")
    return int(match[1]), int(match[2])


#: What the rows and columns are.
_LEGEND = """\
LoRA         plain LoRA on all candidate sites
plan         this plan
WeightLoRA+  the plan's sites at the rank that uses plain LoRA's parameters
sites        linear layers that carry an adapter
trained      parameters that are trained, with a new task head
AdamW        its two moments of the trained parameters
saved        what the forward pass saves for the backward pass
total        trained parameters, their gradients, AdamW and saved; the frozen
             weights come on top
step         time ÷ plain LoRA's by PEFT, median of the rounds
spread       lowest and highest ratio of a round"""


def _table(lines: Sequence[Estimate], title: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    for header in ("sites", "trained", "AdamW\nMB", "saved\nMB", "total\nMB", "step\n÷ LoRA", "spread"):
        table.add_column(header, justify="right", vertical="bottom", no_wrap=True)
    for line in lines:
        in_mb = [_mb(n) for n in (line.optimizer_bytes, line.saved_bytes, line.memory_bytes)]
        low, high = line.step_range
        spread = "" if line.name == "LoRA" else f"{low:.2f}–{high:.2f}"
        table.add_row(line.name, str(line.sites), f"{line.parameters:,}", *in_mb, f"{line.step_ratio:.2f}", spread)
    return table


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f}" if count < 1e9 else f"{count / 1e6:,.0f}"


def _model_and_loss(plan: AdapterPlan, path: str | None, length: int) -> tuple[Any, Any]:
    """The base model with the head of the plan's task, and the loss of a batch of made-up tokens."""
    if path is None:
        raise OptionError("the plan names no base model; give --model_name_or_path")

    from weightlora.cost.made_up_batch import make_loss_of, require_length
    from weightlora.tasks.embedded import base_files
    from weightlora.tasks.pretrained import load_pretrained

    task = str(plan.lora.get("task_type"))
    if task not in LOADERS:
        raise OptionError(f"a plan of task_type={task} has no loss to estimate; there are {', '.join(LOADERS)}")
    folder, gguf = base_files(path) or (path, None)
    model: Any = load_pretrained(LOADERS[task], folder, seed=0, **({} if gguf is None else {"gguf_file": gguf}))
    require_length(model.config, length)
    return model, make_loss_of(task, length, model.device)
