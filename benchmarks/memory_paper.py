"""Memory at the paper's own sizes, computed from configs: no weights, no GPU.

    python benchmarks/memory_paper.py six        # six models: every method, and the seconds it took
    python benchmarks/memory_paper.py recipes    # sites, parameters and bytes of the paper's recipes

``weightlora paper figure6 --size full`` and ``figure7`` draw the paper's figures. The batches are those of
``recipes/paper``. Everything is computed for a GPU's kernels; nothing was measured on one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig

from weightlora.cost.empty_model import make_empty_model, make_loss_of
from weightlora.cost.estimate import MemoryLine, compare_memory
from weightlora.cost.memory import Setting
from weightlora.paper.study import read_study, recipe_of
from weightlora.runs.recipe import read_recipe

PAPER = Path(__file__).parents[1] / "recipes" / "paper"
CONFIGS = PAPER / "configs"
#: Task type and batch of each model: rows x tokens.
SIX = {
    "deberta-v3-base": ("SEQ_CLS", 32, 256),
    "bart-large": ("SEQ_2_SEQ_LM", 8, 512),
    "llama-3-8b": ("CAUSAL_LM", 8, 512),
    "qwen3-8b": ("CAUSAL_LM", 8, 512),
    "llama-3.1-70b": ("CAUSAL_LM", 8, 512),
    "qwen3-30b-a3b": ("CAUSAL_LM", 8, 512),
}
#: Config of each of the paper's models.
HUB = {
    "microsoft/deberta-v3-base": "deberta-v3-base",
    "facebook/bart-large": "bart-large",
    "meta-llama/Meta-Llama-3-8B": "llama-3-8b",
    "Qwen/Qwen3-8B": "qwen3-8b",
}
TASKS = {"table1": "SEQ_CLS", "table2": "SEQ_CLS", "table3": "SEQ_CLS", "table4": "CAUSAL_LM"}
TASKS |= {"table5": "QUESTION_ANS", "table6": "SEQ_2_SEQ_LM"}
RECIPES = ("table1-rte", "table2-rte", "table3-rte", "table4-gsm8k", "table5-squad", "table6-xsum")


def main() -> None:
    """Print one table as Markdown."""
    tables = {"six": six, "recipes": recipes}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=tuple(tables))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for line in tables[parser.parse_args().table]():
        print(line, flush=True)


def six() -> Iterator[str]:
    """Every method for each model."""
    yield "| model, batch | method | sites | trained | weights | grads | AdamW | saved | logits | peak GB |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    seconds: list[str] = []
    for name, (task, rows, length) in SIX.items():
        start = time.process_time()
        for line in _compare(name, task, LoraConfig(r=8, task_type=task), Setting(rows), length):
            m = line.memory
            parts = " | ".join(_gb(n) for n in (m.weights, m.gradients, m.optimizer, m.saved, m.logits, m.peak))
            yield f"| {name}, {rows}x{length} | {line.name} | {line.sites or ''} | {m.trained:,} | {parts} |"
        seconds.append(f"{name} {time.process_time() - start:.1f}")
    yield f"\nSeconds of one CPU core: {', '.join(seconds)}."


def recipes() -> Iterator[str]:
    """Sites, trained parameters and peak of LoRA and WeightLoRA under a recipe of each table."""
    yield "| recipe | model | batch | n | K | LoRA trained | LoRA GB | WeightLoRA GB (upper to lower) |"
    yield "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |"
    for name in RECIPES:
        recipe, task = _recipe(name), TASKS[name.partition("-")[0]]
        rows, length = recipe["per_device_train_batch_size"], recipe["max_seq_length"]
        model, k = HUB[recipe["model_name_or_path"]], recipe["adapters"]
        bits = 8 if recipe.get("load_in_8bit") else None
        # TRL's trainer, which Table 4's recipe runs, computes activations again by default.
        again = read_recipe(recipe, ["--use_cpu", "true"]).training.gradient_checkpointing
        setting = Setting(rows, gradient_checkpointing=bool(again))
        lines = _compare(model, task, _lora(recipe, task), setting, length, adapters=[k], bits=bits)
        lora, upper, lower = (next(line for line in lines if line.name == name) for name in NAMES)
        kind = ", ".join([model, *["8 bit"] * bool(bits), *["checkpointing"] * setting.gradient_checkpointing])
        memory = f"{_gb(lora.memory.peak)} | {_gb(upper.memory.peak)} to {_gb(lower.memory.peak)}"
        yield f"| {name} | {kind} | {rows}x{length} | {lora.sites} | {k} | {lora.memory.trained:,} | {memory} |"


NAMES = ("LoRA", "WeightLoRA upper", "WeightLoRA lower")


def _compare(
    name: str, task: str, lora: LoraConfig, setting: Setting, length: int, *, adapters: Any = (), bits: Any = None
) -> list[MemoryLine]:
    config = transformers.AutoConfig.from_pretrained(str(CONFIGS / f"{name}.json"))
    make_model = partial(make_empty_model, config, task, bits=bits)
    return compare_memory(make_model, make_loss_of(task, length, "meta"), lora, setting, adapters=adapters)


def _recipe(name: str) -> dict[str, Any]:
    study, _, task = name.partition("-")
    return recipe_of(read_study(study, PAPER), task)


def _lora(recipe: dict[str, Any], task: str) -> LoraConfig:
    return LoraConfig(
        r=recipe["lora_r"],
        lora_dropout=recipe["lora_dropout"],
        target_modules=recipe.get("lora_target_modules"),
        task_type=task,
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:,.2f}"


if __name__ == "__main__":
    main()
