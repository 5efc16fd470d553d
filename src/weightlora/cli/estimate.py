"""``weightlora estimate``: what training a plan takes next to plain LoRA, or each method's memory from a config."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.cli._help import add_command
from weightlora.errors import DataError, OptionError
from weightlora.model.sites import LOADERS
from weightlora.text import gigabytes
from weightlora.validation import Count, Share, checked

if TYPE_CHECKING:
    from rich.table import Table

    from weightlora.cost.estimate import EstimateLine, FloorLine, MemoryLine
    from weightlora.plan.plan import AdapterPlan

_BYTES = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "estimate",
        run,
        help="memory and step time of a plan, or memory from a config alone",
        description=(
            "With a plan: print parameters, memory and step time of LoRA, of the plan and of WeightLoRA+. Without a "
            "plan: print the memory of full fine-tuning, LoRA, WeightLoRA and WeightLoRA+ on one device. That needs "
            "only the model's config.json; nothing is loaded or trained."
        ),
        examples=[
            "weightlora estimate runs/demo/plan.json --batch 32x512",
            "weightlora estimate --model_name_or_path Qwen/Qwen3-8B --batch 8x512 --memory 24GB",
            "weightlora estimate --model_name_or_path Qwen/Qwen3-8B --batch 8x512 --store 395000x3",
        ],
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
    add = parser.add_argument_group("options without a plan").add_argument
    alone = [
        add(
            "--adapters",
            nargs="+",
            metavar="K",
            help="how many WeightLoRA keeps: numbers, or shares of them; default: n/2 n/4 n/10",
        ),
        add("--memory", help="memory of a device, such as 24GB or 24GiB: also print the largest batch that fits"),
        add(
            "--store",
            metavar="ROWSxEPOCHS",
            help="such as 395000x3: instead print what floors of 1/6 to 5/6 of the depth take in a training with "
            "store_frozen and offload",
        ),
        add("--optim", default="adamw_torch", help="adamw_torch, adamw_torch_fused, adamw_8bit, adafactor or sgd"),
        add("--gradient_checkpointing", action="store_true", help="with gradient checkpointing"),
        add(
            "--fsdp",
            type=int,
            default=1,
            metavar="N",
            help="devices that share weights, gradients and optimizer; default: %(default)s",
        ),
        add("--load_in_4bit", action="store_true", help="linear layers in 4 bit (NF4), as bitsandbytes stores them"),
        add("--load_in_8bit", action="store_true", help="linear layers in 8 bit, as bitsandbytes stores them"),
        add("--double_quant", action="store_true", help="with --load_in_4bit: scales in 8 bit"),
        add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; default: the config's"),
        add("--task_type", choices=tuple(LOADERS), metavar="TYPE", help=f"{', '.join(LOADERS)}; default: the config's"),
        add("--device", choices=("cuda", "cpu"), default="cuda", help="whose kernels: cuda (default) or cpu"),
        add("--lora_r", type=int, default=8, metavar="R", help="rank of plain LoRA; default: %(default)s"),
        add(
            "--lora_dropout", type=float, default=0.0, metavar="P", help="dropout of the adapters; default: %(default)s"
        ),
        add("--lora_target_modules", nargs="+", metavar="NAME", help="default: every linear layer but head and pooler"),
    ]
    parser.set_defaults(alone={one.dest: one.default for one in alone})


def run(arguments: argparse.Namespace) -> None:
    """Print the table."""
    rows, length = _read_pair("batch", arguments.batch)
    if arguments.path is None:
        if arguments.fast:
            raise OptionError("--fast needs a plan; leave it out")
        _print_memory(arguments, rows, length)
        return
    for name, default in arguments.alone.items():
        if getattr(arguments, name) != default:
            raise OptionError(f"--{name} is for estimates without a plan; leave out --{name}, or {arguments.path}")

    from weightlora.cli._screen import PlainConsole
    from weightlora.cli._streams import quiet_libraries
    from weightlora.cost.estimate import estimate
    from weightlora.plan.plan import AdapterPlan

    plan = AdapterPlan.load(arguments.path)
    with quiet_libraries():
        model, make_loss = _model_and_loss(plan, arguments.model_name_or_path or plan.base_model, length)
        lines = estimate(plan, model, make_loss, rows=rows, length=length, fast=arguments.fast)
    console = PlainConsole()
    console.print(_table(lines, f"one training step, {rows} rows of {length} tokens"))
    console.print(_LEGEND, highlight=False)


def _read_pair(option: str, text: str) -> tuple[int, int]:
    """Rows and tokens of a row, or rows and epochs."""
    match = re.fullmatch(r"([1-9][0-9]{0,6})[x×]([1-9][0-9]{0,6})", text)
    if match is None:
        allowed = "rows x tokens, such as 32x512" if option == "batch" else "rows x epochs, such as 395000x3"
        raise OptionError(f"--{option} {text!r} is not allowed: give {allowed}, each below 10,000,000")
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


def _table(lines: Sequence[EstimateLine], title: str) -> Table:
    headers = ("sites", "trained", "AdamW\nMB", "saved\nMB", "total\nMB", "step\n÷ LoRA", "spread")
    table = _empty_table(title, "", *headers, padding=(0, 1, 0, 0))
    for line in lines:
        in_mb = [_mb(n) for n in (line.optimizer_bytes, line.saved_bytes, line.memory_bytes)]
        low, high = line.step_range
        spread = "" if line.name == "LoRA" else f"{low:.2f}–{high:.2f}"
        table.add_row(line.name, str(line.sites), f"{line.parameters:,}", *in_mb, f"{line.step_ratio:.2f}", spread)
    return table


def _empty_table(title: str, *headers: str, padding: tuple[int, int, int, int] | int = 0) -> Table:
    """Columns of numbers; the one without a header has names."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, padding=padding)
    for header in headers:
        table.add_column(header, justify="right" if header else "left", vertical="bottom", no_wrap=True)
    return table


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f}" if count < 1e9 else f"{count / 1e6:,.0f}"


def _model_and_loss(plan: AdapterPlan, path: str | None, length: int) -> tuple[Any, Any]:
    """The base model with the head of the plan's task, and the loss of a batch of made-up tokens."""
    if path is None:
        raise OptionError("the plan names no base model; give --model_name_or_path")

    from weightlora.cost.empty_model import make_loss_of, require_length
    from weightlora.tasks.embedded import base_files
    from weightlora.tasks.pretrained import load_pretrained

    task = str(plan.lora.get("task_type"))
    if task not in LOADERS:
        raise OptionError(f"a plan of task_type={task} has no loss to estimate; there are {', '.join(LOADERS)}")
    folder, gguf = base_files(path) or (path, None)
    model: Any = load_pretrained(LOADERS[task], folder, seed=0, **({} if gguf is None else {"gguf_file": gguf}))
    require_length(model.config, length)
    return model, make_loss_of(task, length, model.device)


# -- without a plan ----------------------------------------------------------------------------------------------------


def _print_memory(arguments: argparse.Namespace, rows: int, length: int) -> None:
    """Print the table."""
    if arguments.model_name_or_path is None:
        raise OptionError("give a plan.json, or --model_name_or_path with a hub name, a folder or a config.json")
    if arguments.double_quant and not arguments.load_in_4bit:
        raise OptionError("--double_quant needs --load_in_4bit")
    if arguments.load_in_4bit and arguments.load_in_8bit:
        raise OptionError("--load_in_4bit and --load_in_8bit exclude each other; give one")
    for name, kind in (("fsdp", Count), ("lora_r", Count), ("lora_dropout", Share)):
        checked(kind, getattr(arguments, name), f"--{name}")
    limit = None if arguments.memory is None else _read_memory(arguments.memory)
    stored = None if arguments.store is None else _read_pair("store", arguments.store)
    if stored and (limit or arguments.adapters):
        raise OptionError("--store prints floors, without --memory and --adapters; leave these out")

    from peft import LoraConfig

    from weightlora.cli._screen import PlainConsole
    from weightlora.cli._streams import quiet_casts, quiet_libraries
    from weightlora.cost.empty_model import make_loss_of, require_length
    from weightlora.cost.estimate import compare_floors, compare_memory
    from weightlora.cost.memory import Setting
    from weightlora.plan.limits import read_limit

    adapters: list[Any] = [read_limit("adapters", text) for text in arguments.adapters or ()]
    quiet_casts()
    with quiet_libraries():
        config = _load_config(arguments.model_name_or_path)
        task = arguments.task_type or _task_type(config)
        require_length(config, length)
        dtype = arguments.dtype or _dtype_of(config)
        setting = Setting(rows, arguments.optim, arguments.gradient_checkpointing, arguments.fsdp, arguments.device)
        lora = LoraConfig(
            r=arguments.lora_r,
            lora_dropout=arguments.lora_dropout,
            target_modules=arguments.lora_target_modules,
            task_type=task,
        )
        given = (lambda: _make_model(config, task, dtype, arguments), make_loss_of(task, length, "meta"), lora, setting)
        lines = [] if stored else compare_memory(*given, adapters=adapters, limit=limit)
        floors = compare_floors(*given, tokens=stored[0] * length, epochs=stored[1]) if stored else []
    words = [f"{rows} rows of {length} tokens", f"r = {lora.r}", arguments.optim]
    words.append("4 bit" if arguments.load_in_4bit else "8 bit" if arguments.load_in_8bit else dtype)
    words += ["checkpointing"] if setting.gradient_checkpointing else []
    words += [f"{setting.shards} devices"] if setting.shards > 1 else []
    console = PlainConsole()
    if stored:
        words.append(f"{stored[0]:,} rows, {stored[1]} epochs")
        console.print(_floor_table(floors, f"computed GB on one device: {', '.join(words)}"))
        console.print(_FLOOR_LEGEND, highlight=False)
        return
    console.print(_memory_table(lines, f"computed GB on one device: {', '.join(words)}", arguments.memory))
    console.print(_MEMORY_LEGEND, highlight=False)


def _read_memory(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([MG]i?B)\s*", text, re.IGNORECASE)
    units = {unit.lower(): size for unit, size in _BYTES.items()}
    amount = int(Fraction(match[1]) * units[match[2].lower()]) if match else 0
    if not 0 < amount < 2**60:
        raise OptionError(f"--memory {text!r} is not allowed: give the memory of a device, such as 24GB or 24GiB")
    return amount


def _load_config(path: str) -> Any:
    """The config of a hub name, a folder or a file."""
    from transformers import AutoConfig

    from weightlora.tasks.embedded import base_files

    folder, _ = base_files(path) or (path, None)
    try:
        return AutoConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"cannot read a config from --model_name_or_path {path}: {text}") from error


def _task_type(config: Any) -> str:
    """The task of the class that the config names; else a causal model where transformers has no masked one."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    if config.is_encoder_decoder:
        return "SEQ_2_SEQ_LM"
    for architecture in config.architectures or ():
        for task, loader in LOADERS.items():
            if architecture.endswith(loader.removeprefix("AutoModel")):
                return task
    is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    return "CAUSAL_LM" if is_causal else "SEQ_CLS"


def _dtype_of(config: Any) -> str:
    return "float32" if config.dtype is None else str(config.dtype).removeprefix("torch.")


def _make_model(config: Any, task: str, dtype: str, arguments: argparse.Namespace) -> Any:
    import torch

    from weightlora.cost.empty_model import make_empty_model

    bits = 4 if arguments.load_in_4bit else 8 if arguments.load_in_8bit else None
    return make_empty_model(config, task, dtype=getattr(torch, dtype), bits=bits, double=arguments.double_quant)


#: What the rows and columns are.
_MEMORY_LEGEND = """\
upper, lower WeightLoRA keeps the uppermost or the lowest sites; the backward
             pass ends at the lowest one
WeightLoRA+  the first of these numbers, at the rank that uses LoRA's parameters
sites        linear layers that carry an adapter
trained      parameters that are trained, with a new task head
weights      all parameters; with FSDP a share, and the blocks that are gathered
saved        what the forward pass keeps for the backward pass
logits       logits, loss and their gradients
peak         the most at one moment; the parts are the most of each, and not
             all there at the same time
rows         the largest batch that fits --memory"""


def _memory_table(lines: Sequence[MemoryLine], title: str, memory: str | None) -> Table:
    rows = () if memory is None else ("rows",)
    headers = ("sites", "trained", "weights", "grads", "optim", "saved", "logits", "peak", *rows)
    table = _empty_table(title, "", *headers)
    for line in lines:
        m = line.memory
        in_gb = [gigabytes(n) for n in (m.weights, m.gradients, m.optimizer, m.saved, m.logits, m.peak)]
        rows = () if line.largest_batch is None else (f"{line.largest_batch:,}",)
        table.add_row(line.name, str(line.sites or ""), _millions(m.trained), *in_gb, *rows)
    return table


def _millions(count: int) -> str:
    return f"{count / 1e9:,.2f}B" if count >= 1e9 else f"{count / 1e6:,.2f}M"


#: What the rows and columns are.
_FLOOR_LEGEND = """\
below    share of the blocks that lie below the lowest adapter; LoRA is on all
         sites above them
time     of the whole training ÷ LoRA's on all sites; products with weights
         alone are counted, so that a large output head is in it
away     weights below, which leave the device after the first epoch (offload)
weights  all others
saved    what the forward pass keeps for the backward pass
peak     the most at one moment of a later epoch
store    hidden states of all rows, in memory or on disk"""


def _floor_table(lines: Sequence[FloorLine], title: str) -> Table:
    """What each floor takes in a training that stores what is frozen."""
    headers = ("below", "sites", "time", "away", "weights", "grads", "optim", "saved", "logits", "peak", "store")
    table = _empty_table(title, *headers)
    for line in lines:
        m = line.memory
        parts = (m.weights, m.gradients, m.optimizer, m.saved, m.logits, m.peak, line.store)
        in_gb = map(gigabytes, (line.offloaded, *parts))
        table.add_row(line.name, str(line.sites), f"{line.time:.2f}", *in_gb)
    return table
