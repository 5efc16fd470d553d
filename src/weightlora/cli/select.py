"""``weightlora select``: model and data → plan.json and its heat map."""

from __future__ import annotations

import argparse
import difflib
import os
from pathlib import Path
from typing import Any

from weightlora.errors import DataError, OptionError


def add_parser(commands: Any) -> None:
    """Add the command; every option can also stand in the YAML file under the same name."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "select",
        help="find the adapters that matter: plan.json and a heat map",
        description="Run the warm-up and write plan.json and heatmap.png. Without model and data, the embedded ones.",
        epilog="example: weightlora select --train_file reviews.csv --keep 0.5 --output_dir runs/select",
    )
    add = parser.add_argument
    add("--config", type=Path, help="YAML file with any of these options; the command line wins")
    add("--model_name_or_path", help="hub name or folder; default: the embedded MiniLM")
    add("--task", choices=("classification", "causal_lm"), default="classification", help="default: %(default)s")
    add("--train_file", type=Path, help=".csv, .json or .jsonl; default: the embedded film reviews")
    add("--text_column", default="text", help="default: %(default)s")
    add("--label_column", default="label", help="not read for causal_lm; default: %(default)s")
    add("--max_length", type=int, default=128, help="tokens a row; default: %(default)s")
    add("--per_device_train_batch_size", type=int, default=32, help="default: %(default)s")
    add("--lora_r", type=int, default=8, help="default: %(default)s")
    add("--lora_alpha", type=int, default=16, help="default: %(default)s")
    add("--lora_dropout", type=float, default=0.0, help="default: %(default)s")
    add("--lora_target_modules", nargs="+", help="default: every linear layer but head and pooler")
    add("--keep", default="0.5", help='fraction, count, "300k parameters", 512MB or 0.8x; default: %(default)s')
    add("--rule", default="first_order", help="first_order or stoiht (the paper); default: %(default)s")
    add("--steps", type=int, help="T; default: 20")
    add("--head_steps", type=int, help="steps for a fresh head alone; 0 is the paper; default: 20 where there is one")
    add("--threshold_every", type=int, default=1, help="stoiht: steps between thresholds; default: %(default)s")
    add("--threshold", default="magnitude", help="stoiht: magnitude or signed; default: %(default)s")
    add("--learning_rate", type=float, default=1e-3, help="default: %(default)s")
    add("--gate_lr", type=float, default=5.0, help="stoiht: step size of the gates; default: %(default)s")
    add("--fast", nargs="?", const="input", help="the cheaper LoRA step; input or rank: what its dropout drops")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--expand", action="store_true", help="WeightLoRA+: give the survivors the freed rank")
    add("--output_dir", type=Path, default=Path("runs/select"), help="default: %(default)s")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> None:
    """Select, write the plan and its picture, and print the heat map."""
    options = _with_config(arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise OptionError(
            f"weightlora select is one process, and this is one of {os.environ['WORLD_SIZE']}; start it without "
            "torchrun or accelerate, or let `weightlora train` select with all of them (docs/distributed.md)"
        )

    from rich.console import Console

    from weightlora.cli._quiet import quiet_libraries
    from weightlora.files import writable_folder
    from weightlora.plan.budget import read_keep
    from weightlora.report.heatmap import draw_heatmap, terminal_heatmap
    from weightlora.selection.select import select

    output = writable_folder(options.output_dir)
    with quiet_libraries():
        model, batches, task_type = _model_and_batches(options)
        plan = select(
            model,
            batches,
            lora=_lora_config(options, task_type),
            keep=read_keep(str(options.keep)),
            steps=options.steps,
            seed=options.seed,
            rule=options.rule,
            head_steps=options.head_steps,
            threshold_every=options.threshold_every,
            threshold=options.threshold,
            lr=options.learning_rate,
            gate_lr=options.gate_lr,
            fast=options.fast,
        )
    plan = plan.expand() if options.expand else plan
    plan.save(output / "plan.json")
    draw_heatmap(plan, output / "heatmap.png")
    console = Console()
    console.print(terminal_heatmap(plan))
    console.print(f"wrote {output / 'plan.json'} and {output / 'heatmap.png'}", soft_wrap=True)


def _with_config(arguments: argparse.Namespace) -> argparse.Namespace:
    """Return the options of the YAML file under those of the command line, both checked by the same parser."""
    if arguments.config is None:
        return arguments
    import yaml

    try:
        content: Any = yaml.safe_load(arguments.config.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"cannot read {arguments.config}: {reason}") from error
    if not isinstance(content, dict):
        raise DataError(f"{arguments.config} holds a {type(content).__name__}; give lines of 'option: value'")
    known = [key for key in vars(arguments) if key not in ("config", "run", "parser", "command", "words")]
    words: list[str] = []
    for key, value in content.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f" (closest: {close[0]!r})" if close else ""
            raise OptionError(f"{arguments.config}: unknown option {key!r}{hint}")
        if value is True or value is False:
            words += [f"--{key}"] if value else []
        elif value is not None:
            words += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    parser: argparse.ArgumentParser = arguments.parser
    return parser.parse_args([*words, *arguments.words])  # the later word wins


def _model_and_batches(options: argparse.Namespace) -> tuple[Any, list[dict[str, Any]], str]:
    """Load the model and as many training batches as the warm-up can use."""
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

    from weightlora.plan.budget import warmup_steps
    from weightlora.selection.select import HEAD_STEPS
    from weightlora.tasks import causal_lm, classification, embedded, local, pretrained

    causal = options.task == "causal_lm"
    if options.train_file is None:
        rows = [(text, str(label)) for text, label in embedded.rotten_tomatoes().train]
    else:
        label = None if causal else options.label_column
        rows = local.read_rows(options.train_file, text=options.text_column, label=label)
    path = options.model_name_or_path or (embedded.minilm() if not causal else None)
    if path is None:
        raise OptionError("--task causal_lm needs --model_name_or_path")
    tokenizer = pretrained.load_tokenizer(path)
    head_steps = HEAD_STEPS if options.head_steps is None else options.head_steps
    count = (options.steps or warmup_steps(None)) + head_steps
    if causal:
        model = pretrained.load_pretrained("AutoModelForCausalLM", path, seed=options.seed)
        encoded = causal_lm.encode_text(tokenizer, [text for text, _ in rows], max_length=options.max_length)
    else:
        numbered, labels = local.number_labels(rows)
        model = classification.load_classifier(path, labels=len(labels), seed=options.seed)
        encoded = classification.encode(tokenizer, numbered, max_length=options.max_length)
    batches = classification.shuffled_batches(
        encoded,
        DataCollatorForSeq2Seq(tokenizer) if causal else DataCollatorWithPadding(tokenizer),
        batch_size=options.per_device_train_batch_size,
        count=max(count, 1),
        seed=options.seed,
    )
    return model, batches, "CAUSAL_LM" if causal else "SEQ_CLS"


def _lora_config(options: argparse.Namespace, task_type: str) -> Any:
    from peft import LoraConfig

    targets: list[str] | None = options.lora_target_modules
    return LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type=task_type,  # pyright: ignore[reportArgumentType]  # PEFT takes the word as well as the enum
    )
