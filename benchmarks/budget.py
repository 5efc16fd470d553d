"""How well the cost model knows bytes and time: estimated against counted and measured, for ten random plans a model.

    python benchmarks/budget.py minilm        # or smollm2, wide; appends benchmarks/results/budget.jsonl
    python benchmarks/budget.py minilm --fast # the same of the fast step, with input dropout 0.05
    python benchmarks/budget.py table         # prints Markdown

Bytes are exact counts (``saved_tensors_hooks``) on the model that really carries the plan. Times are medians over
rounds of interleaved steps; plain LoRA is one of them, and both sides are ratios to it.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from weightlora import enable_fast_lora
from weightlora.bench.records import append_record, read_records
from weightlora.cost.knapsack import CostBudget
from weightlora.cost.saved_bytes import saved_cost
from weightlora.cost.step_time import interleaved, median_ratio, saved_bytes, time_cost
from weightlora.model.layers import lora_layers
from weightlora.model.sites import find_sites
from weightlora.plan.plan import make_plan

RESULTS = Path(__file__).parent / "results" / "budget.jsonl"
PLANS = 10


def main() -> None:
    """Measure one model, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*MODELS, "table"))
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; default: %(default)s")
    parser.add_argument("--fast", action="store_true", help="the fast step, with dropout 0.05")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "table":
        print_table()
    else:
        measure(arguments.what, arguments.rounds, fast=arguments.fast)


def minilm() -> tuple[nn.Module, LoraConfig, int, int]:
    """MiniLM with a head of two classes, and the shape of its batch."""
    from weightlora.tasks.classification import load_classifier
    from weightlora.tasks.embedded import minilm as folder

    return load_classifier(folder(), labels=2, seed=0), LoraConfig(r=8, task_type="SEQ_CLS"), 16, 32


def smollm2() -> tuple[nn.Module, LoraConfig, int, int]:
    """SmolLM2-135M."""
    from weightlora.tasks.embedded import smollm2 as file
    from weightlora.tasks.pretrained import load_pretrained

    model = load_pretrained("AutoModelForCausalLM", file().parent, seed=0, gguf_file=file().name, dtype=torch.float32)
    return model, LoraConfig(r=8, task_type="CAUSAL_LM"), 1, 48


def wide() -> tuple[nn.Module, LoraConfig, int, int]:
    """A wide and shallow random Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4, "num_attention_heads": 16}
    return LlamaForCausalLM(LlamaConfig(vocab_size=1000, **sizes)), LoraConfig(r=8, task_type="CAUSAL_LM"), 1, 32


MODELS = {"minilm": minilm, "smollm2": smollm2, "wide": wide}


def measure(name: str, rounds: int, *, fast: bool) -> None:
    """Estimate and measure ten random plans, and a plan for four fifths of the time."""
    base, lora, rows, length = MODELS[name]()
    sites = find_sites(base, lora).sites
    n = len(sites)
    lora.target_modules = [site.name for site in sites]
    lora.lora_dropout = 0.05 if fast else 0.0
    trained: Callable[[Any], Any] = enable_fast_lora if fast else lambda model: model
    model: Any = trained(get_peft_model(base, lora).train())  # type: ignore[arg-type]
    tokens = torch.randint(4, 900, (rows, length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "labels": tokens if lora.task_type == "CAUSAL_LM" else tokens[:, 0] % 2}
    saved = saved_cost(model, lambda: [model(**batch).loss])

    def fake() -> Any:
        yield model(**{key: torch.zeros(value.shape, dtype=torch.long) for key, value in batch.items()}).loss

    unreal = saved_cost(model, fake, fake=True).of_all / saved.of_all - 1
    times = time_cost(model, lambda: [model(**batch).loss], rounds=rounds)
    draw = random.Random(0)
    sizes = [draw.random() for _ in range(n)]  # stand for scores, of which the cost knows nothing
    plans = [draw.sample(range(n), draw.randint(1, n - 1)) for _ in range(PLANS)]
    budget = CostBudget((times,), (int(0.8 * times.of_all),))
    chosen, top = budget.choose(sizes), _top(budget, sizes)

    layers: list[Any] = list(lora_layers(model).values())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def with_sites(kept: list[int]) -> None:
        for i, layer in enumerate(layers):
            layer.enable_adapters(i in kept)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    seconds = interleaved([partial(with_sites, kept) for kept in (list(range(n)), *plans, chosen)], rounds)
    model_name = f"{name}, fast" if fast else name
    common = {"model": model_name, "sites": n, "rows": rows, "length": length, "fake_error": unreal}
    unwrapped = model.unload()
    for place, kept in enumerate(plans, start=1):
        planned = trained(make_plan(sites, lora, [sites[i].name for i in kept]).attach(unwrapped).train())
        counted = saved_bytes(planned, batch)
        unwrapped = planned.base_model.unload()  # type: ignore[operator]
        record = {**common, "study": "plan", "kept": len(kept), "estimated_bytes": saved.of(kept), "bytes": counted}
        ratios = {"estimated_time": times.of(kept) / times.of_all, "time": median_ratio(seconds[place], seconds[0])}
        append_record(RESULTS, {**record, **ratios})
    scores = {"score": math.fsum(sizes[i] for i in chosen), "top_score": math.fsum(sizes[i] for i in top)}
    ratio = {
        "kept": len(chosen),
        "estimated_time": times.of(chosen) / times.of_all,
        "time": median_ratio(seconds[-1], seconds[0]),
    }
    append_record(RESULTS, {**common, "study": "0.8x", **ratio, **scores})
    print_table()


def _top(budget: CostBudget, sizes: list[float]) -> list[int]:
    """The most sites of falling score that the limit pays for."""
    ranked = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    return max((ranked[:k] for k in range(len(sizes)) if budget.holds(ranked[:k])), key=len)


def print_table() -> None:
    """Print the worst and the median error of each model, and its 0.8x plan, of the latest run."""
    print(
        "| model | sites | bytes, worst error | a fake pass | time, worst error | median | 0.8x plan | score ÷ top K |"
    )
    print("|" + " --- |" * 8)
    for name in (name + step for step in ("", ", fast") for name in MODELS):
        records = [record for record in read_records(RESULTS) if record["model"] == name]
        plans = [r for r in records if r["study"] == "plan"][-PLANS:]
        if not plans:
            continue
        last = [r for r in records if r["study"] == "0.8x"][-1]
        in_bytes = max(abs(r["estimated_bytes"] / r["bytes"] - 1) for r in plans)
        in_time = [abs(r["estimated_time"] / r["time"] - 1) for r in plans]
        cells = (
            name,
            last["sites"],
            f"{in_bytes:.4%}",
            f"{abs(last['fake_error']):.4%}",
            f"{max(in_time):.1%}",
            f"{statistics.median(in_time):.1%}",
            f"{last['time']:.3f}",
            f"{last['score'] / last['top_score']:.2f}" if last["top_score"] else "no top K fits",
        )
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
