"""How far low precision moves a plan, and that what saves memory does not: Jaccard similarity to the fp32 plan.

    python benchmarks/precision.py run      # MiniLM on film reviews, K = n/2, both rules, three seeds
    python benchmarks/precision.py table    # the stored records as Markdown

Every plan is that of ``select_for(trainer)``. ``run`` appends JSON lines to ``benchmarks/results/precision.jsonl`` and
goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from weightlora.bench.records import append_record, read_records

RESULTS = Path(__file__).parent / "results" / "precision.jsonl"
RULES = ("first_order", "paper")
LR = 1e-3
MAX_LENGTH = 32
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True)
class Variant:
    """A way to run the scoring, under the name that it has in the table."""

    label: str
    loading: dict[str, Any] = field(default_factory=dict)
    """For ``from_pretrained``; ``bits`` is for bitsandbytes."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """For ``TrainingArguments``."""
    accumulate: int = 1
    shuffled: bool = False
    """Whether the labels mean nothing: a negative control."""
    reference: str = "fp32"


REENTRANT = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
VARIANTS = (
    Variant("fp32"),
    Variant("8-bit", {"bits": 8}),
    Variant("4-bit (NF4)", {"bits": 4}),
    Variant("bf16 autocast", arguments={"bf16": True}),
    Variant("bf16 weights", {"dtype": "bfloat16"}),
    Variant("checkpointing", arguments={"activation_checkpointing": True}),
    Variant("checkpointing, reentrant", arguments=REENTRANT),
    Variant("accumulation", accumulate=4),  # other dropout masks: each micro-batch draws its own
    Variant("fp32, dropout 0", WITHOUT_DROPOUT),
    Variant("accumulation, dropout 0", WITHOUT_DROPOUT, accumulate=4, reference="fp32, dropout 0"),
    Variant("labels shuffled", shuffled=True),
)


def main() -> None:
    """Run the study, or print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("run", "table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument(
        "--steps", type=int, default=20, help="scoring steps of head and of gates; default: %(default)s"
    )
    parser.add_argument("--batch_size", type=int, default=32, help="rows a step, a multiple of 4; default: %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the records are")
    arguments = parser.parse_args()
    if arguments.study == "run":
        run(arguments.results, arguments.seeds, arguments.steps, arguments.batch_size)
    else:
        print_table(read_records(arguments.results), arguments.steps, arguments.batch_size)


def run(path: Path, seeds: Sequence[int], steps: int, batch_size: int) -> None:
    """Find the plans that have no record yet."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    for seed, rule, variant in tqdm(list(itertools.product(seeds, RULES, VARIANTS)), desc="plans"):
        key = {"variant": variant.label, "rule": rule, "seed": seed, "steps": steps, "batch_size": batch_size}
        if any(all(record[name] == value for name, value in key.items()) for record in read_records(path)):
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            plan = find_plan(variant, rule, seed, steps, batch_size, folder)
        seconds = round(time.perf_counter() - start, 2)
        append_record(path, {**key, "kept": plan.names, "scores": plan.scores, "seconds": seconds})


def find_plan(variant: Variant, rule: str, seed: int, steps: int, batch_size: int, folder: str) -> Any:
    """The plan of one variant, as the line in a user's script finds it."""
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    from weightlora import select_for
    from weightlora.selection.rules import rule_of
    from weightlora.tasks.classification import encode
    from weightlora.tasks.embedded import minilm, rotten_tomatoes
    from weightlora.tasks.pretrained import load_tokenizer

    tokenizer = load_tokenizer(minilm())
    rows = encode(tokenizer, rotten_tomatoes(train=2000, test=1000).train, max_length=MAX_LENGTH)
    if variant.shuffled:
        labels = random.Random(seed).sample([row["labels"] for row in rows], len(rows))
        rows = [{**row, "labels": label} for row, label in zip(rows, labels, strict=True)]
    trainer = Trainer(
        model=lora_model(seed, **variant.loading),
        args=TrainingArguments(
            output_dir=folder,
            max_steps=1,
            per_device_train_batch_size=batch_size // variant.accumulate,
            gradient_accumulation_steps=variant.accumulate,
            learning_rate=LR,
            seed=seed,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            **variant.arguments,
        ),
        train_dataset=rows,  # pyright: ignore
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.model_accepts_loss_kwargs = False  # BERT's loss is a mean over rows, whatever its **kwargs promise
    head_steps = steps if rule == "first_order" else 0  # 0 in the paper
    return select_for(trainer, adapters=18, rule=rule_of(rule, head_steps=head_steps), ranking="score", steps=steps)


def lora_model(seed: int, bits: int | None = None, **loading: Any) -> Any:
    """MiniLM with rank-8 LoRA on its 36 sites, loaded as asked."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    from weightlora.model.sites import find_sites
    from weightlora.tasks.embedded import minilm
    from weightlora.tasks.pretrained import load_pretrained

    if bits is not None:
        loading["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=bits == 8,
            load_in_4bit=bits == 4,
            bnb_4bit_quant_type="nf4",
            llm_int8_skip_modules=["classifier"],
        )
    base: Any = load_pretrained("AutoModelForSequenceClassification", minilm(), seed=seed, num_labels=2, **loading)
    if bits is not None:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    lora = LoraConfig(r=8, lora_alpha=32, task_type="SEQ_CLS")
    lora.target_modules = [site.name for site in find_sites(base, lora).sites]
    return get_peft_model(base, lora)


# --- Table -------------------------------------------------------------------------------------------------------


def print_table(records: list[dict[str, Any]], steps: int, batch_size: int) -> None:
    """Print each variant against its reference with the same seed; the last two rows of a rule are the controls."""
    records = [r for r in records if (r["steps"], r["batch_size"]) == (steps, batch_size)]
    print("| rule | scoring | Jaccard, mean | least | equal plans | scores moved, mean | most |\n|" + " --- |" * 7)
    for rule in RULES:
        found = {(r["variant"], r["seed"]): r for r in records if r["rule"] == rule}
        for variant in VARIANTS:
            pairs = [
                (record, found[variant.reference, seed])
                for (label, seed), record in found.items()
                if label == variant.label != variant.reference and (variant.reference, seed) in found
            ]
            print_row(rule, variant.label, pairs)
        print_row(
            rule, "another seed", list(itertools.combinations([r for (v, _), r in found.items() if v == "fp32"], 2))
        )
    print(f"\nOf random choices, one in a thousand has a Jaccard similarity above {chance(records):.2f}.")


def print_row(rule: str, label: str, pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Print how alike the two plans of each pair are; nothing where there is no pair."""
    if not pairs:
        return
    likeness = [len(set(a["kept"]) & set(b["kept"])) / len(set(a["kept"]) | set(b["kept"])) for a, b in pairs]
    moved = [distance(a["scores"], b["scores"]) for a, b in pairs]
    cells = (
        rule,
        label,
        f"{statistics.mean(likeness):.3f}",
        f"{min(likeness):.3f}",
        f"{sum(value == 1 for value in likeness)} of {len(pairs)}",
        f"{statistics.mean(moved):.1e}",
        f"{max(moved):.1e}",
    )
    print(f"| {' | '.join(cells)} |")


def distance(scores: dict[str, float], reference: dict[str, float]) -> float:
    """Σ|score − reference| ÷ Σ|reference|: 0 where nothing moved."""
    moved = sum(abs(scores[name] - value) for name, value in reference.items())
    return moved / sum(map(abs, reference.values()))


def chance(records: list[dict[str, Any]]) -> float:
    """The Jaccard similarity that 99.9 % of the random choices of K of n do not exceed."""
    from scipy.stats import hypergeom

    n, k = len(records[0]["scores"]), len(records[0]["kept"])
    overlap = hypergeom.ppf(0.999, n, k, k)
    return float(overlap / (2 * k - overlap))


if __name__ == "__main__":
    main()
