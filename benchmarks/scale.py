"""How the step's and the selection's cost grow: over 36, 210 and 2,000 sites, over ranks 1 to 128, and with few tokens.

    python benchmarks/scale.py          # prints Markdown, appends benchmarks/results/scale.jsonl

The overhead of adapters is the time of a step with them, less that of the frozen model, on the same batch and one
thread; the steps are interleaved. Small layers show what a site costs, wide ones what a rank costs. With few tokens,
as where text is generated, the fast step should be no slower than PEFT's: its time as a ratio, on SmolLM2's width.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from weightlora import enable_fast_lora, select
from weightlora.bench.records import append_record
from weightlora.cost.step_time import interleaved, median_ratio

RESULTS = Path(__file__).parent / "results" / "scale.jsonl"
SITES = (36, 210, 2000)
RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
#: MiniLM's: layers, width and tokens of a batch.
WIDE = (36, 384, 1024)
#: Of a batch, where there are few.
TOKENS = (1, 4, 16, 64, 128, 256)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds; default: %(default)s")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)

    costs: dict[str, list[float]] = {"PEFT step": [], "fast step": [], "selection": []}
    for sites in SITES:
        net, x = chain(sites, width=64), torch.randn(1024, 64)  # fewer tokens would be PEFT's
        costs["PEFT step"] += overheads(net, x, [8], rounds, fast=False)
        costs["fast step"] += overheads(net, x, [8], rounds, fast=True)
        costs["selection"].append(selection_seconds(net, x, rounds))
    report("sites", SITES, costs)

    net, x = chain(WIDE[0], WIDE[1]), torch.randn(WIDE[2], WIDE[1])
    report("rank", RANKS, {f"{k} step": overheads(net, x, RANKS, rounds, fast=k == "fast") for k in ("PEFT", "fast")})

    report_few_tokens(rounds)


def chain(sites: int, width: int) -> nn.Module:
    """Frozen linear layers, one after another; rotations, so that 2,000 of them neither shrink nor blow up anything."""
    torch.manual_seed(0)
    layers = [nn.Linear(width, width, bias=False) for _ in range(sites)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
    return nn.Sequential(*layers).requires_grad_(False)


def overheads(net: nn.Module, x: Tensor, ranks: Sequence[int], rounds: int, *, fast: bool) -> list[float]:
    """Median seconds that adapters of each rank add to a step whose backward pass runs through all layers anyway."""
    targets = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    steps = [step(net, x)]
    for rank in ranks:
        model: Any = get_peft_model(chain(len(targets), x.shape[-1]), LoraConfig(r=rank, target_modules=targets))  # type: ignore[arg-type]
        steps.append(step(enable_fast_lora(model) if fast else model, x))
    frozen, *adapted = interleaved(steps, rounds, warmups=2)
    return [statistics.median(a - b for a, b in zip(times, frozen, strict=True)) for times in adapted]


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """A training step, as often as it is called."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5) if trained else None

    def run() -> None:
        model(x.detach().requires_grad_(True)).square().mean().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return run


def selection_seconds(net: nn.Module, x: Tensor, rounds: int) -> float:
    """Median seconds of a selection on five batches."""
    targets = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    lora = LoraConfig(r=8, target_modules=targets)

    def chosen() -> float:
        start = time.perf_counter()
        select(net, [x] * 5, lora=lora, steps=5, loss_fn=lambda m, b: m(b).square().mean(), progress=False)
        return time.perf_counter() - start

    return statistics.median(chosen() for _ in range(max(rounds // 4, 1)))


def report(over: str, sizes: Sequence[int], costs: dict[str, list[float]]) -> None:
    """Print and store each cost with its slope: the line through the sizes that is least off in relative terms."""
    print(f"\n| {over} | {' | '.join(map(str, sizes))} | µs for one more | fixed, ms | worst distance from the line |")
    print("|" + " --- |" * (len(sizes) + 4))
    for name, seconds in costs.items():
        slope, fixed = np.polyfit(sizes, seconds, 1, w=1 / np.array(seconds))
        off = max(abs((fixed + slope * size) / measured - 1) for size, measured in zip(sizes, seconds, strict=True))
        cells = [f"{1e3 * s:.1f} ms" for s in seconds] + [f"{1e6 * slope:.1f}", f"{1e3 * fixed:.2f}", f"{off:.0%}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        fit = {"slope": float(slope), "fixed": float(fixed), "worst": float(off)}
        append_record(RESULTS, {"over": over, "what": name, "sizes": list(sizes), "seconds": seconds, **fit})


def report_few_tokens(rounds: int) -> None:
    """Print and store the time of the fast step over PEFT's, for a forward pass of its own and for a step."""
    print(f"\n| fast ÷ PEFT, tokens | {' | '.join(map(str, TOKENS))} |\n|{' --- |' * (len(TOKENS) + 1)}")
    targets = [str(index) for index in range(20)]
    for what, run, dropout, p in (
        ("forward, no gradients", forward, "input", 0.0),
        ("step, dropout 0", step, "input", 0.0),
        ("step, input dropout 0.05", step, "input", 0.05),
        ("step, rank dropout 0.05", step, "rank", 0.05),
    ):
        lora = LoraConfig(r=8, lora_dropout=p, target_modules=targets)
        stock, fast = (get_peft_model(chain(len(targets), 576), lora).train() for _ in range(2))  # type: ignore[arg-type]
        enable_fast_lora(fast, dropout)
        ratios = []
        for tokens in TOKENS:
            x = torch.randn(tokens, 576)
            theirs, ours = interleaved([run(stock, x), run(fast, x)], 3 * rounds, warmups=2)
            ratios.append(median_ratio(ours, theirs))
        print(f"| {what} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |", flush=True)
        append_record(RESULTS, {"over": "tokens", "what": what, "sizes": list(TOKENS), "ratios": ratios})


def forward(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """A pass as where text is generated, as often as it is called."""

    def run() -> None:
        with torch.no_grad():
            model(x)

    return run


if __name__ == "__main__":
    main()
