"""``weightlora demo``: LoRA, random, WeightLoRA and WeightLoRA+ side by side, on an embedded model and real text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftModel
    from rich.console import Console

    from weightlora.bench.comparison import Comparison
    from weightlora.bench.run import Outcome
    from weightlora.cli._progress import Steps

#: Everything the methods share but the seed.
_EPOCHS, _BATCH_SIZE, _MAX_LENGTH, _LR = 2, 32, 32, 1.5e-3
_TRAIN, _TEST = 2000, 1000
#: Test sentences whose logits are left in results.json.
_PROBE = 8


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo",
        help="compare the methods on the embedded model and data",
        description="Train MiniLM on 2,000 film reviews with each method; takes a few minutes on two cores.",
        epilog="example: weightlora demo --output_dir runs/demo",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="head, data order, selection; default: %(default)s")
    parser.add_argument("--train_size", type=int, default=_TRAIN, help="sentences to train on; default: %(default)s")
    parser.add_argument("--test_size", type=int, default=_TEST, help="sentences to test on; default: %(default)s")
    parser.add_argument("--fast", action="store_true", help="train and select with the cheaper LoRA step")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Train the four methods, leave adapters, plan, picture and numbers, and print the table."""
    from rich.console import Console

    from weightlora.cli._progress import Steps
    from weightlora.cli._quiet import quiet_libraries
    from weightlora.files import writable_folder
    from weightlora.report.heatmap import draw_heatmap, terminal_heatmap

    output: Path = writable_folder(arguments.output_dir)
    console = Console()
    with quiet_libraries():
        outcomes, lines, probe = _train_all(arguments, output, Steps(console))
    plan = outcomes["weightlora"].plan
    plan.save(output / "plan.json")
    draw_heatmap(plan, output / "heatmap.png")
    _write_results(output, lines, probe, arguments)
    console.print(terminal_heatmap(plan))
    _print_table(console, lines, arguments.train_size)
    console.print(f"left in {output}: plan.json, heatmap.png, results.json, and an adapter directory a method")


def _train_all(
    arguments: argparse.Namespace, output: Path, steps: Steps
) -> tuple[dict[str, Outcome], list[Comparison], dict[str, Any]]:
    """Train and save each method, then time their steps in turns."""
    from peft import LoraConfig
    from transformers import AutoTokenizer, DataCollatorWithPadding

    from weightlora.bench.comparison import compare
    from weightlora.bench.run import Settings, train_classifier
    from weightlora.methods import make_method
    from weightlora.tasks.classification import encode, shuffled_batches
    from weightlora.tasks.embedded import minilm, rotten_tomatoes

    settings = Settings(
        minilm(), epochs=_EPOCHS, batch_size=_BATCH_SIZE, lr=_LR, seed=arguments.seed, fast=arguments.fast
    )
    lora = LoraConfig(r=8, lora_alpha=32, task_type="SEQ_CLS")
    fast = "input" if arguments.fast else None
    chosen: dict[str, dict[str, Any]] = {
        "lora": {},
        "random": {"keep": 0.5, "seed": arguments.seed},
        "weightlora": {"keep": 0.5, "seed": arguments.seed, "lr": _LR, "fast": fast},
        "weightlora_plus": {"keep": 0.5, "seed": arguments.seed, "lr": _LR, "fast": fast},
    }
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    data = rotten_tomatoes(arguments.train_size, test=arguments.test_size)
    train_rows = encode(tokenizer, data.train, max_length=_MAX_LENGTH)
    test_rows = encode(tokenizer, data.test, max_length=_MAX_LENGTH)
    collate = DataCollatorWithPadding(tokenizer)
    probe: dict[str, Any] = {"texts": [text for text, _ in data.test[:_PROBE]], "logits": {}}
    outcomes: dict[str, Outcome] = {}
    for name, options in chosen.items():
        bar = steps.method(name)
        steps.say(f"{name}: {'selecting, then training' if 'lr' in options else 'training'}")
        method = make_method(name, **options)
        outcome = train_classifier(settings, method, lora, tokenizer, train_rows, test_rows, callbacks=[bar])
        steps.say(f"{name}: accuracy {outcome.accuracy:.3f}")
        outcome.plan.save_adapter(outcome.model, output / name)
        probe["logits"][name] = _logits(outcome.model, collate([dict(row) for row in test_rows[:_PROBE]]))
        outcomes[name] = outcome
    steps.say("timing the training steps in turns")
    batch = shuffled_batches(train_rows, collate, batch_size=_BATCH_SIZE, count=1, seed=0)[0]
    return outcomes, compare(outcomes, batch), probe


def _logits(model: PeftModel, batch: Any) -> list[list[float]]:
    """What the running model says, for those who want to compare it with what they load."""
    import torch

    model.eval()
    with torch.no_grad():
        return model(**batch).logits.tolist()


def _write_results(output: Path, lines: list[Comparison], probe: dict[str, Any], arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from weightlora.bench.records import provenance
    from weightlora.files import write_json

    settings = {
        "model": "all-MiniLM-L6-v2",
        "data": "rotten_tomatoes",
        "train": arguments.train_size,
        "test": arguments.test_size,
        "epochs": _EPOCHS,
        "batch_size": _BATCH_SIZE,
        "max_length": _MAX_LENGTH,
        "learning_rate": _LR,
        "lora": "r=8, lora_alpha=32, all 36 linear layers of the encoder",
        "seed": arguments.seed,
        "fast": arguments.fast,
    }
    methods = [asdict(line) for line in lines]
    results = {"settings": settings, "methods": methods, "probe": probe, "provenance": provenance()}
    write_json(output / "results.json", results)


def _print_table(console: Console, lines: list[Comparison], sentences: int) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    from weightlora.bench.comparison import table_rows

    header, rows = table_rows(lines)
    title = f"MiniLM, {sentences:,} film reviews, {_EPOCHS} epochs, same data order and steps"
    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    for column in header:
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
