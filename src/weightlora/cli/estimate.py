"""``weightlora estimate``: what training a plan takes, beside plain LoRA and the plan's expansion."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.errors import OptionError

if TYPE_CHECKING:
    from weightlora.plan.plan import AdapterPlan

#: transformers' loader and the shape of the labels, by PEFT's task type: those of a row, or one a token.
_LOADERS = {
    "SEQ_CLS": ("AutoModelForSequenceClassification", "row"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "span"),
    "CAUSAL_LM": ("AutoModelForCausalLM", "token"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", "token"),
}


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "estimate",
        help="parameters, bytes and step time of a plan, beside plain LoRA",
        description="Bytes are exact for full rows of the batch, without running it; steps are timed on a smaller one.",
        epilog="example: weightlora estimate runs/demo/plan.json --batch 32x512",
    )
    parser.add_argument("path", type=Path, help="plan.json")
    parser.add_argument("--batch", required=True, help="rows x tokens, such as 32x512")
    parser.add_argument("--model_name_or_path", help="default: the base model that the plan names")
    parser.add_argument(
        "--fast",
        nargs="?",
        const="input",
        choices=("input", "rank"),
        help="three more lines, with the cheaper LoRA step; input or rank: what its dropout drops",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the table."""
    match = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", arguments.batch)
    if match is None:
        raise OptionError(f"--batch {arguments.batch!r} is not allowed: give rows x tokens, such as 32x512")

    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from weightlora.cli._quiet import quiet_libraries
    from weightlora.cost.estimate import estimate
    from weightlora.plan.plan import AdapterPlan

    plan = AdapterPlan.load(arguments.path)
    rows, length = int(match[1]), int(match[2])
    with quiet_libraries():
        model, make_loss = _model_and_loss(plan, arguments.model_name_or_path or plan.base_model, length)
        lines = estimate(plan, model, make_loss, rows=rows, length=length, fast=arguments.fast)
    table = Table(title=f"a training step of {rows} rows of {length} tokens", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    for header in ("adapters", "trained", "AdamW MB", "saved MB", "together MB", "step ÷ LoRA"):
        table.add_column(header, justify="right")
    for line in lines:
        in_mb = (f"{n / 1e6:,.1f}" for n in (line.optimizer_bytes, line.saved_bytes, line.memory_bytes))
        table.add_row(line.name, str(line.sites), f"{line.parameters:,}", *in_mb, f"{line.step_ratio:.2f}")
    console = Console()
    console.print(table)
    console.print("together: trained parameters, gradients, AdamW's state, saved bytes; the frozen weights not counted")


def _model_and_loss(plan: AdapterPlan, path: str | None, length: int) -> tuple[Any, Any]:
    """The base model with the head of the plan's task, and the loss of a batch of made-up tokens."""
    if path is None:
        raise OptionError("the plan names no base model; give --model_name_or_path")

    import torch

    from weightlora.tasks.embedded import embedded_model
    from weightlora.tasks.pretrained import load_pretrained

    task = str(plan.lora.get("task_type"))
    if task not in _LOADERS:
        raise OptionError(f"a plan of task_type={task} has no loss to estimate; there are {', '.join(_LOADERS)}")
    loader, kind = _LOADERS[task]
    folder, gguf = embedded_model(path) or (path, None)
    model: Any = load_pretrained(loader, folder, seed=0, **({} if gguf is None else {"gguf_file": gguf}))
    most = getattr(model.config, "max_position_embeddings", length)
    if length > most:
        raise OptionError(f"--batch has rows of {length} tokens, but the model reads {most} at most")

    def make_loss(called: Any, rows: int) -> Any:
        tokens = torch.ones((rows, length), dtype=torch.long, device=model.device)
        labels = {"start_positions": tokens[:, 0], "end_positions": tokens[:, 0]}
        if kind != "span":
            labels = {"labels": tokens if kind == "token" else tokens[:, 0]}
        return called(input_ids=tokens, **labels).loss

    return model, make_loss
