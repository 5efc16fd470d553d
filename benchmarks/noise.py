"""How much of the mean gradient is signal: the first-order gain on batches that did not choose the step.

    python benchmarks/noise.py          # prints Markdown, appends benchmarks/results/noise.jsonl

Half of the batches give the mean gradient a of B, the other half b. A sign step along a has the predicted gain
‖a‖₁; its gain on the held-out half is ⟨sign(a), b⟩. Their ratio is 1 where all batches agree and 0 where the gradients
are noise. The order of the sites by ‖a‖₁ has a meaning only where the ratio is well above 0.
"""

from __future__ import annotations

import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from weightlora.bench.records import append_record
from weightlora.model.layers import lora_layers
from weightlora.model.sites import find_sites
from weightlora.tasks.classification import encode, load_classifier, shuffled_batches
from weightlora.tasks.embedded import minilm, rotten_tomatoes
from weightlora.tasks.pretrained import load_tokenizer

RESULTS = Path(__file__).parent / "results" / "noise.jsonl"
HEAD_STEPS = (0, 5, 20)
SEEDS = (0, 1, 2, 3, 4)
BATCHES = 20


def main() -> None:
    """Measure and print."""
    from transformers import DataCollatorWithPadding
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    tokenizer = load_tokenizer(minilm())
    rows = encode(tokenizer, rotten_tomatoes(train=2000, test=1000).train, max_length=32)
    collate = DataCollatorWithPadding(tokenizer)
    print("| head_steps | gain on other batches ÷ own gain, five seeds | mean |\n| --- | --- | --- |")
    for head_steps in HEAD_STEPS:
        shares: list[float] = []
        for seed in SEEDS:
            batches = shuffled_batches(rows, collate, batch_size=32, count=head_steps + BATCHES, seed=seed)
            shares.append(signal_share(batches, head_steps, seed))
            append_record(RESULTS, {"study": "signal", "head_steps": head_steps, "seed": seed, "share": shares[-1]})
        print(f"| {head_steps} | {' '.join(f'{s:.2f}' for s in shares)} | {statistics.mean(shares):.2f} |", flush=True)


def signal_share(batches: list[dict[str, Any]], head_steps: int, seed: int) -> float:
    """Gain of a sign step on the other half of the batches ÷ on its own half, over all sites, both ways."""
    base = load_classifier(minilm(), labels=2, seed=seed)
    lora = LoraConfig(r=8, lora_alpha=32, task_type="SEQ_CLS")
    lora.target_modules = [site.name for site in find_sites(base, lora).sites]
    torch.manual_seed(seed)
    model = get_peft_model(base, lora).train()  # type: ignore[arg-type]
    matrices = [layer.lora_B["default"].weight for layer in lora_layers(model).values()]
    head = [p for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]

    only(model, head)
    optimizer = torch.optim.AdamW(head, lr=1e-3)
    for batch in batches[:head_steps]:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    only(model, matrices)
    halves = [mean_gradient(model, matrices, batches[head_steps + half :: 2]) for half in (0, 1)]
    own = sum(g.abs().sum() for half in halves for g in half)
    other = sum((a.sign() * b).sum() + (b.sign() * a).sum() for a, b in zip(*halves, strict=True))
    return float(other / own)


def mean_gradient(model: Any, matrices: list[Any], batches: list[dict[str, Any]]) -> list[torch.Tensor]:
    """∂L/∂B of each site, averaged over ``batches``."""
    for batch in batches:
        model(**batch).loss.backward()
    gradients = [matrix.grad / len(batches) for matrix in matrices]
    for matrix in matrices:
        matrix.grad = None
    return gradients


def only(model: Any, parameters: list[Any]) -> None:
    """Let exactly ``parameters`` have gradients."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)


if __name__ == "__main__":
    main()
