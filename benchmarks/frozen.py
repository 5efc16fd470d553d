"""Step time with and without a store, for floors of one to five sixths of the blocks, beside LoRA on all of them.

    python benchmarks/frozen.py minilm smollm2

One process and one thread; whole, planned and stored steps are interleaved, and medians are taken. The formula counts a
forward and a backward pass as 1 each: a floor above the share f takes (2 - f) / 2 of LoRA's step, with the store 1 - f.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from weightlora.bench.records import append_record
from weightlora.model.frozen_prefix import FrozenPrefix, find_floor
from weightlora.model.hidden_store import HiddenStore

RECORDS = Path(__file__).parent / "results" / "frozen.jsonl"
ROWS, TOKENS, SIXTHS = 16, 32, range(1, 6)
ROUNDS = {"minilm": 15, "smollm2": 5}


def main() -> None:
    """Measure the named models, and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=("minilm", "smollm2"))
    torch.set_num_threads(1)
    for name in parser.parse_args().models:
        print(f"\n{name}\n\n| floor | step | formula | with the store | formula | bytes a token |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        for sixths in SIXTHS:
            row = measured(name, sixths)
            append_record(RECORDS, {"model": name, "sixths": sixths, **row})
            share = row["below"] / row["blocks"]
            cells = (f"{row['step']:.2f}", f"{1 - share / 2:.2f}", f"{row['stored']:.2f}", f"{1 - share:.2f}")
            print(f"| {row['below']} of {row['blocks']} | {' | '.join(cells)} | {row['bytes_a_token']} |")


def measured(name: str, sixths: int) -> dict[str, Any]:
    """Median step times of a floor, relative to LoRA on all blocks."""
    batch = batch_of(name)
    whole, planned = model_of(name, 0), model_of(name, sixths)
    prefix = FrozenPrefix(planned, HiddenStore(torch.float32), dropout_off=True)
    planned.eval()
    planned(**batch)
    prefix.find_below(prefix.inputs)
    times: dict[str, list[float]] = {"whole": [], "step": [], "stored": []}
    for _ in range(ROUNDS[name] + 1):  # the first fills the store
        times["whole"].append(seconds(whole, batch))
        times["stored"].append(seconds(planned, batch))
        prefix.remove()
        times["step"].append(seconds(planned, batch))
        prefix.attach()
    own, all_of = (statistics.median(times[key][1:]) for key in ("stored", "whole"))
    floor = find_floor(planned)
    return {
        "below": floor.below,
        "blocks": len(floor.blocks),
        "step": statistics.median(times["step"][1:]) / all_of,
        "stored": own / all_of,
        "seconds": all_of,
        "bytes_a_token": prefix.store.bytes // (ROWS * TOKENS),
    }


def seconds(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """A training step without the optimizer's, whose parameters are few."""
    model.train()
    model.zero_grad()
    start = time.perf_counter()
    model(**batch).loss.backward()
    return time.perf_counter() - start


def model_of(name: str, sixths: int) -> Any:
    """The model with LoRA of rank 8 on all linear layers of its blocks from the floor on."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from weightlora.tasks.embedded import embedded_model

    found = embedded_model(f"embedded/{name}")
    assert found is not None
    kind = AutoModelForSequenceClassification if name == "minilm" else AutoModelForCausalLM
    base = kind.from_pretrained(found[0], **({} if found[1] is None else {"gguf_file": found[1]}))
    blocks = base.config.num_hidden_layers
    upper = "|".join(map(str, range(round(blocks * sixths / 6), blocks)))
    names = r"(query|key|value|dense)" if name == "minilm" else r"\w+_proj"
    return get_peft_model(base, LoraConfig(r=8, target_modules=rf".*layers?\.({upper})\..*{names}"))


def batch_of(name: str) -> dict[str, torch.Tensor]:
    """Rows of one length."""
    tokens = torch.randint(1000, 20000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(ROWS, dtype=torch.long) if name == "minilm" else tokens
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


if __name__ == "__main__":
    main()
