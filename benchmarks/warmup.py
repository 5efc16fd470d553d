"""What the gates cost: saved bytes, step time and its growth with the number of sites, against stock PEFT LoRA.

    export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=8589934592 OMP_NUM_THREADS=1
    python benchmarks/warmup.py          # prints Markdown, appends benchmarks/results/warmup.jsonl

Without these, glibc gives memory back and takes it again, which costs a step up to 8 % and never twice the same.

Bytes are exact counts (``saved_tensors_hooks``). Times are medians of ratios round by round, to the mean of
two stock steps; the steps of a round are taken in an order of its own, and stock against itself is the control.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from weightlora.bench.records import append_record
from weightlora.cost.step_time import interleaved, median_ratio, saved_bytes
from weightlora.model.gates import gated
from weightlora.model.layers import lora_layers

RESULTS = Path(__file__).parent / "results" / "warmup.jsonl"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="timed rounds; default: %(default)s")
    rounds = parser.parse_args().rounds
    print(
        "| model | sites | closed | dropout | saved bytes ÷ stock | step time ÷ stock | stock ÷ stock |\n|"
        + " --- |" * 7
    )
    for dropout, closed in itertools.product((0.0, 0.05), (0, 18)):
        model, batch = minilm_step(dropout)
        omega = torch.ones(len(lora_layers(model)))
        omega[::2][:closed] = 0
        stock, with_gates = saved_bytes(model, batch), gated_bytes(model, batch, omega)
        ratio, control = step_ratios(model, batch, omega, rounds)
        cells = (len(omega), closed, dropout, f"{with_gates / stock:.5f}", f"{ratio:.4f}", f"{control:.4f}")
        print(f"| MiniLM, 32 reviews | {' | '.join(map(str, cells))} |", flush=True)
        record = {"study": "step", "model": "minilm", "sites": len(omega), "closed": closed, "dropout": dropout}
        times = {"time_ratio": ratio, "control_ratio": control}
        append_record(RESULTS, {**record, "bytes": with_gates, "stock_bytes": stock, **times})

    print("\n| sites | gate cost a step, ms | a site, µs |\n| --- | --- | --- |")
    for sites in (36, 210, 2000):
        seconds = gate_seconds(sites, rounds)
        print(f"| {sites} | {1e3 * seconds:.2f} | {1e6 * seconds / sites:.1f} |", flush=True)
        append_record(RESULTS, {"study": "growth", "sites": sites, "seconds": seconds})


def minilm_step(dropout: float) -> tuple[PeftModel, dict[str, Tensor]]:
    """MiniLM with rank-8 LoRA on its 36 sites, and a batch of 32 film reviews."""
    from transformers import DataCollatorWithPadding
    from transformers.utils import logging

    from weightlora.model.sites import find_sites
    from weightlora.tasks.classification import encode, load_classifier, shuffled_batches
    from weightlora.tasks.embedded import minilm, rotten_tomatoes
    from weightlora.tasks.pretrained import load_tokenizer

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = load_tokenizer(minilm())
    rows = encode(tokenizer, rotten_tomatoes(train=32, test=0).train, max_length=32)
    batch = shuffled_batches(rows, DataCollatorWithPadding(tokenizer), batch_size=32, count=1, seed=0)[0]
    base = load_classifier(minilm(), labels=2, seed=0)
    lora = LoraConfig(r=8, lora_alpha=32, lora_dropout=dropout, task_type="SEQ_CLS")
    lora.target_modules = [site.name for site in find_sites(base, lora).sites]
    return get_peft_model(base, lora).train(), batch  # type: ignore[return-value]


def gated_bytes(model: PeftModel, batch: dict[str, Tensor], omega: Tensor) -> int:
    """What :func:`saved_bytes` counts in a scoring step."""
    with gated(lora_layers(model)) as gates:
        gates.write(omega)
        return saved_bytes(model, batch)


def step_ratios(model: PeftModel, batch: dict[str, Tensor], omega: Tensor, rounds: int) -> tuple[float, float]:
    """Time of a gated scoring step, and of a stock LoRA step, ÷ that of a stock LoRA step on the same model."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    layers = lora_layers(model)

    def stock() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def with_gates() -> None:
        with gated(layers) as gates:
            gates.write(omega)
            model(**batch).loss.backward()
            gates.write(gates.omega - 1e-6 * gates.gradient)
            optimizer.step()
            optimizer.zero_grad()
            gates.clear()

    first, with_gates_seconds, second = interleaved([stock, with_gates, stock], rounds, warmups=2)
    mean = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    return median_ratio(with_gates_seconds, mean), median_ratio(second, first)


def gate_seconds(sites: int, rounds: int) -> float:
    """Median extra seconds of a gated step over a stock one, for tiny layers: what the gates alone cost."""
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(sites)))
    model: Any = get_peft_model(net, LoraConfig(r=2, target_modules=[str(i) for i in range(sites)]))  # type: ignore[arg-type]
    x, layers = torch.ones(4, 8), lora_layers(model)

    def stock() -> None:
        model(x).sum().backward()

    with gated(layers) as gates:

        def with_gates() -> None:
            model(x).sum().backward()
            gates.write(gates.omega - 1e-6 * gates.gradient)
            gates.clear()

        gated_seconds = statistics.median(interleaved([with_gates], rounds)[0])
    return gated_seconds - statistics.median(interleaved([stock], rounds)[0])


if __name__ == "__main__":
    main()
