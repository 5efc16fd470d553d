"""``weightlora estimate`` without a plan: the memory of each method, from a model's config alone."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from weightlora.errors import DataError, OptionError
from weightlora.model.loaders import LOADERS

if TYPE_CHECKING:
    from rich.table import Table

    from weightlora.cost.comparison import MemoryLine

_BYTES = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}
_DTYPES = ("float32", "bfloat16", "float16")
_DEFAULTS: dict[str, Any] = {
    "keep": None,
    "memory": None,
    "optim": "adamw_torch",
    "gradient_checkpointing": False,
    "fsdp": 1,
    "load_in_4bit": False,
    "load_in_8bit": False,
    "double_quant": False,
    "dtype": None,
    "task_type": None,
    "device": "cuda",
    "lora_r": 8,
    "lora_dropout": 0.0,
    "lora_target_modules": None,
}


def add_options(group: Any) -> None:
    """Add the options to a group of the parser."""

    def add(name: str, text: str, **options: Any) -> None:
        group.add_argument(f"--{name}", default=_DEFAULTS[name], help=text, **options)

    add(
        "keep",
        "budgets: numbers of adapters or fractions of the parameters; default: n/2 n/4 n/10",
        nargs="+",
        metavar="K",
    )
    add("memory", "memory of a device, such as 24GB or 24GiB: also print the largest batch that fits")
    add("optim", "adamw_torch, adamw_torch_fused, adamw_8bit, adafactor or sgd; default: %(default)s")
    add("gradient_checkpointing", "with gradient checkpointing", action="store_true")
    add("fsdp", "devices that share weights, gradients and optimizer; default: %(default)s", type=int, metavar="N")
    add("load_in_4bit", "linear layers in 4 bit (NF4), as bitsandbytes stores them", action="store_true")
    add("load_in_8bit", "linear layers in 8 bit, as bitsandbytes stores them", action="store_true")
    add("double_quant", "with --load_in_4bit: scales in 8 bit", action="store_true")
    add("dtype", "of the weights; default: the config's", choices=_DTYPES)
    add("task_type", f"{', '.join(LOADERS)}; default: what the config is for", choices=tuple(LOADERS), metavar="TYPE")
    add("device", "whose kernels: cuda (default) or cpu", choices=("cuda", "cpu"))
    add("lora_r", "rank of plain LoRA; default: %(default)s", type=int, metavar="R")
    add("lora_dropout", "dropout of the adapters; default: %(default)s", type=float, metavar="P")
    add("lora_target_modules", "default: every linear layer but head and pooler", nargs="+", metavar="NAME")


def require_defaults(arguments: argparse.Namespace) -> None:
    """Raise if an option that needs no plan is given with one.

    Raises:
        OptionError: With the first such option.
    """
    for name, default in _DEFAULTS.items():
        if getattr(arguments, name) != default:
            raise OptionError(f"--{name} is for estimates without a plan; leave out --{name}, or {arguments.path}")


def print_memory(arguments: argparse.Namespace, rows: int, length: int) -> None:
    """Print the table."""
    if arguments.model_name_or_path is None:
        raise OptionError("give a plan.json, or --model_name_or_path with a hub name, a folder or a config.json")
    if arguments.double_quant and not arguments.load_in_4bit:
        raise OptionError("--double_quant needs --load_in_4bit")
    if arguments.load_in_4bit and arguments.load_in_8bit:
        raise OptionError("--load_in_4bit and --load_in_8bit exclude each other; give one")
    for name in ("fsdp", "lora_r"):
        if getattr(arguments, name) < 1:
            raise OptionError(f"--{name} {getattr(arguments, name)} is not allowed: give a whole number of at least 1")
    if not 0 <= arguments.lora_dropout < 1:
        raise OptionError(f"--lora_dropout {arguments.lora_dropout} is not allowed: give at least 0 and less than 1")
    limit = None if arguments.memory is None else _read_memory(arguments.memory)

    from peft import LoraConfig

    from weightlora.cli._console import PlainConsole
    from weightlora.cli._quiet import quiet_casts, quiet_libraries
    from weightlora.cost.comparison import compare_memory
    from weightlora.cost.made_up_batch import make_loss_of, require_length
    from weightlora.cost.memory import Setting
    from weightlora.plan.budget import check_keep

    keep = [check_keep(text) for text in arguments.keep or ()]
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
        lines = compare_memory(
            lambda: _make_model(config, task, dtype, arguments),
            make_loss_of(task, length, "meta"),
            lora,
            setting,
            keep=keep,
            limit=limit,
        )
    words = [f"{rows} rows of {length} tokens", f"r = {lora.r}", arguments.optim]
    words.append("4 bit" if arguments.load_in_4bit else "8 bit" if arguments.load_in_8bit else dtype)
    words += ["checkpointing"] if setting.gradient_checkpointing else []
    words += [f"{setting.shards} devices"] if setting.shards > 1 else []
    console = PlainConsole()
    console.print(_table(lines, f"computed GB on one device: {', '.join(words)}", arguments.memory))
    console.print(_LEGEND, highlight=False)


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
_LEGEND = """\
upper, lower WeightLoRA keeps the uppermost or the lowest sites; the backward
             pass ends at the lowest one
WeightLoRA+  the first of these budgets, at the rank that uses LoRA's parameters
sites        linear layers that carry an adapter
trained      parameters that are trained, with a new task head
weights      all parameters; with FSDP a share, and the blocks that are gathered
saved        what the forward pass keeps for the backward pass
logits       logits, loss and their gradients
peak         the most at one moment; the parts are the most of each, and not
             all there at the same time
rows         the largest batch that fits --memory"""


def _table(lines: Sequence[MemoryLine], title: str, memory: str | None) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column(no_wrap=True)
    rows = () if memory is None else ("rows",)
    for header in ("sites", "trained", "weights", "grads", "optim", "saved", "logits", "peak", *rows):
        table.add_column(header, justify="right", no_wrap=True)
    for line in lines:
        m = line.memory
        in_gb = [_gb(n) for n in (m.weights, m.gradients, m.optimizer, m.saved, m.logits, m.peak)]
        rows = () if line.largest_batch is None else (f"{line.largest_batch:,}",)
        table.add_row(line.name, str(line.sites or ""), _millions(m.trained), *in_gb, *rows)
    return table


def _gb(count: int) -> str:
    gb = count / 1e9
    return f"{gb:,.2f}" if gb < 99.995 else f"{gb:,.1f}" if gb < 999.95 else f"{gb:,.0f}"


def _millions(count: int) -> str:
    return f"{count / 1e9:,.2f}B" if count >= 1e9 else f"{count / 1e6:,.2f}M"
