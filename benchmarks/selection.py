"""What the choice is worth: accuracy and stability of every way to choose K adapters.

    python benchmarks/selection.py minilm     # accuracy, K = 5 and n/2, five seeds, learning rate tuned per method
    python benchmarks/selection.py smollm2    # which sites an LLM's plans keep, and how alike they are
    python benchmarks/selection.py table      # the tables of docs/lab/selection.md from the stored records

Both studies append JSON lines to ``benchmarks/results/selection.jsonl`` and go on where they were stopped.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from weightlora.bench.records import append_record, read_records
from weightlora.methods import make_method
from weightlora.methods.base import ChoosingMethod, Method
from weightlora.model.sites import find_sites
from weightlora.plan.budget import Budget
from weightlora.plan.plan import AdapterPlan, make_plan
from weightlora.selection.rules.first_order import FirstOrder
from weightlora.selection.rules.paper import StoIHT

RESULTS = Path(__file__).parent / "results" / "selection.jsonl"
LEARNING_RATES = (6e-4, 1.5e-3, 4e-3)
TUNING_SEEDS = (100,)  # none that is reported on
SEEDS = (0, 1, 2, 3, 4)
KEEPS = (5, 18)
MAX_LENGTH = 32
VALIDATION = 1000
LLM_STEPS = 10  # batches of eight sums; a step takes seconds


@dataclass(frozen=True)
class Variant:
    """A method with its options, under the name it has in the table."""

    label: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)


CHOICES = (
    Variant("random", "random"),
    Variant("nearest the output", "nearest"),
    *(
        Variant(f"{name}, head_steps={head}", "selected", {"rule": replace(rule, head_steps=head), "ranking": "score"})
        for name, rule in {
            "first_order": FirstOrder(),
            "stoiht, every step": StoIHT(order="joint"),
            "stoiht, once at T": StoIHT(order="joint", threshold_every=20),
        }.items()
        for head in (0, 20)
    ),
)


DEFAULT = "first_order, head_steps=20"  # select()'s defaults on this model at that time


def main() -> None:
    """Run the study named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("minilm", "smollm2", "table"))
    parser.add_argument("--workers", type=int, default=2, help="processes of minilm; default: %(default)s")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if arguments.study == "minilm":
        run_minilm(arguments.workers)
    elif arguments.study == "smollm2":
        run_smollm2()
    else:
        print_tables()


def known(study: str) -> list[dict[str, Any]]:
    """The records of one of the two studies; only MiniLM is trained, and so has a split."""
    return [record for record in read_records(RESULTS) if ("split" in record) == (study == "minilm")]


# --- MiniLM on film reviews --------------------------------------------------------------------------------------


def run_minilm(workers: int) -> None:
    """Tune each method's learning rate on the validation split, then measure it with five seeds on the test split."""
    everything = [(Variant("lora", "lora"), 36), *((v, k) for k in KEEPS for v in CHOICES)]
    run_points(tuning_points(everything), workers)
    run_points(test_points(known("minilm"), everything), workers)


@dataclass(frozen=True)
class Point:
    """One run of the study."""

    variant: Variant
    keep: int
    lr: float
    seed: int
    split: str

    @property
    def key(self) -> dict[str, Any]:
        """What tells its record from the others."""
        return {"method": self.variant.label, "keep": self.keep, "lr": self.lr, "seed": self.seed, "split": self.split}


def tuning_points(methods: Iterable[tuple[Variant, int]]) -> list[Point]:
    """Each method at every learning rate, with a seed and a split of their own."""
    grid = itertools.product(TUNING_SEEDS, methods, LEARNING_RATES)
    return [Point(v, k, lr, seed, "validation") for seed, (v, k), lr in grid]


def test_points(records: list[dict[str, Any]], methods: Iterable[tuple[Variant, int]]) -> list[Point]:
    """Each method at its best learning rate, for every seed."""
    methods = list(methods)
    return [Point(v, k, best_rate(records, v.label, k), seed, "test") for seed in SEEDS for v, k in methods]


def run_points(points: list[Point], workers: int) -> None:
    """Run what has no record yet, each worker with one thread: two threads a step would wait for each other."""
    done = [{k: record[k] for k in points[0].key} for record in known("minilm")]
    missing = [point for point in points if point.key not in done]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        runs = [pool.submit(run_point, point) for point in missing]
        for ended in tqdm(as_completed(runs), desc="runs", total=len(runs)):
            append_record(RESULTS, ended.result())


def run_point(point: Point) -> dict[str, Any]:
    """Train and measure one point."""
    import torch
    from peft import LoraConfig
    from transformers.utils import logging

    from weightlora.errors import SelectionError
    from weightlora.tasks.classification import encode
    from weightlora.tasks.embedded import minilm, rotten_tomatoes
    from weightlora.tasks.pretrained import load_tokenizer

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    tokenizer = load_tokenizer(minilm())
    data = rotten_tomatoes(train=2000, validation=VALIDATION, test=2000)
    train_rows = encode(tokenizer, data.train, max_length=MAX_LENGTH)
    test_rows = encode(tokenizer, getattr(data, point.split), max_length=MAX_LENGTH)
    lora = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.0, task_type="SEQ_CLS")
    method = build(point.variant, keep=point.keep, seed=point.seed, lr=point.lr)
    try:
        outcome = train_classifier(method, lora, tokenizer, train_rows, test_rows, lr=point.lr, seed=point.seed)
    except SelectionError as error:
        return {**point.key, "accuracy": None, "error": str(error)}
    return {
        **point.key,
        **outcome,
        "kept": method.plan.names,
        "adapter_parameters": method.plan.parameters,
        "settings": {"train": 2000, "epochs": 1, "batch_size": 32, "max_length": MAX_LENGTH, "lora": "r=8 a=32"},
    }


def train_classifier(
    method: Method, lora: Any, tokenizer: Any, train_rows: Any, test_rows: Any, *, lr: float, seed: int
) -> dict[str, float]:
    """Train MiniLM for an epoch of batches of 32; return accuracy and seconds."""
    from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments

    from weightlora.tasks.classification import accuracy, load_classifier, shuffled_batches
    from weightlora.tasks.embedded import minilm

    collate = DataCollatorWithPadding(tokenizer)
    base = load_classifier(minilm(), labels=2, seed=seed)
    batches = shuffled_batches(train_rows, collate, batch_size=32, count=64, seed=seed)
    start = time.perf_counter()
    model = method.attach(base, lora, batches, -(-len(train_rows) // 32))
    selected = time.perf_counter()
    arguments = TrainingArguments(
        output_dir="runs/trainer",
        num_train_epochs=1.0,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=128,
        learning_rate=lr,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        weight_decay=1e-4,
        adam_beta2=0.99,
        seed=seed,
        data_seed=seed,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=model,  # type: ignore[arg-type]
        args=arguments,
        train_dataset=list(train_rows),  # type: ignore[arg-type]
        eval_dataset=sorted(test_rows, key=lambda row: len(row["input_ids"])),  # type: ignore[arg-type]
        data_collator=collate,
        compute_metrics=accuracy,
        callbacks=method.callbacks(),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trained = time.perf_counter()
    return {
        "accuracy": trainer.evaluate()["eval_accuracy"],
        "selection_seconds": round(selected - start, 2),
        "training_seconds": round(trained - selected, 2),
    }


def build(variant: Variant, *, keep: int, seed: int, lr: float) -> Method:
    """The method of a variant, with the options that it has."""
    if variant.method == "lora":
        return make_method("lora")
    if variant.method == "random":
        return make_method("random", adapters=keep, seed=seed)
    if variant.method == "nearest":
        return ChoosingMethod(lambda model, lora, _batches, _steps: nearest_the_output(model, lora, keep))
    return make_method(variant.method, adapters=keep, seed=seed, learning_rate=lr, progress=False, **variant.options)


def nearest_the_output(model: Any, lora: Any, keep: int) -> AdapterPlan:
    """Keep the sites that the model defines last."""
    sites = find_sites(model, lora).sites
    defined = [name for name, _ in model.named_modules()]
    budget = Budget.of_count(keep, n=len(sites))
    kept = budget.choose([defined.index(site.name) for site in sites])
    return make_plan(sites, lora, [sites[i].name for i in kept], rule="nearest")


def validation_accuracy(records: Iterable[dict[str, Any]], label: str, keep: int) -> dict[float, float]:
    """Validation accuracy by learning rate; a run that found no plan counts as 0."""
    accuracies: dict[float, list[float]] = defaultdict(list)
    for record in records:
        if (record["method"], record["keep"], record["split"]) == (label, keep, "validation"):
            accuracies[record["lr"]].append(record["accuracy"] or 0.0)
    return {lr: statistics.mean(values) for lr, values in accuracies.items()}


def best_rate(records: Iterable[dict[str, Any]], label: str, keep: int) -> float:
    """The lowest learning rate whose validation accuracy is within one standard error of the best.

    A run on 1,000 sentences cannot tell closer rates apart, and the higher one is the one that may diverge.
    """
    tuned = validation_accuracy(records, label, keep)
    best = max(tuned.values())
    error = (best * (1 - best) / VALIDATION) ** 0.5
    return min(lr for lr, accuracy in tuned.items() if accuracy >= best - error)


# --- SmolLM2 on sums ---------------------------------------------------------------------------------------------


def run_smollm2() -> None:
    """Store the plans of each rule for five seeds: other batches and another A each time."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from weightlora.selection.select import select
    from weightlora.tasks.embedded import smollm2

    file = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    lora = LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM")
    rules = {
        "first_order": FirstOrder(),
        "stoiht, every step": StoIHT(order="joint"),
        "stoiht, once at T": StoIHT(order="joint", threshold_every=LLM_STEPS),
    }
    for seed, (label, rule) in itertools.product(SEEDS, rules.items()):
        if any((r["method"], r["seed"]) == (label, seed) for r in known("smollm2")):
            continue
        batches = list(itertools.islice(sum_batches(tokenizer, seed), LLM_STEPS))
        plan = select(
            model,
            batches,
            lora=lora,
            adapters=105,
            steps=LLM_STEPS,
            seed=seed,
            learning_rate=5e-4,
            rule=rule,
            ranking="score",
        )
        append_record(RESULTS, {"method": label, "keep": 105, "seed": seed, "steps": LLM_STEPS, "kept": plan.names})


def sum_batches(tokenizer: Any, seed: int, batch_size: int = 8) -> Iterator[dict[str, Any]]:
    """Batches of ``chain_sum`` problems; only the answer's tokens have a label."""
    import reasoning_gym
    import torch

    problems = reasoning_gym.create_dataset("chain_sum", size=1000, seed=seed)
    order = random.Random(seed).sample(range(1000), 1000)
    for start in range(0, 1000, batch_size):
        rows: list[tuple[list[int], list[int]]] = []
        for i in order[start : start + batch_size]:
            chat = [{"role": "user", "content": problems[i]["question"]}]
            prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            question = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            answer = tokenizer(problems[i]["answer"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
            rows.append((question, answer))
        longest = max(len(q) + len(a) for q, a in rows)
        pad = [longest - len(q) - len(a) for q, a in rows]
        yield {
            "input_ids": torch.tensor([q + a + [0] * p for (q, a), p in zip(rows, pad, strict=True)]),
            "attention_mask": torch.tensor([[1] * (longest - p) + [0] * p for p in pad]),
            "labels": torch.tensor([[-100] * len(q) + a + [-100] * p for (q, a), p in zip(rows, pad, strict=True)]),
        }


# --- Tables ------------------------------------------------------------------------------------------------------


def print_tables() -> None:
    """Print both studies as Markdown."""
    records = known("minilm")
    rates = {key: best_rate(records, key[1], key[0]) for key in {(r["keep"], r["method"]) for r in records}}
    tested = [r for r in records if r["split"] == "test" and r["lr"] == rates[r["keep"], r["method"]]]
    print("| K | method | lr | adapter parameters | accuracy, mean ± s.e. | runs | mean Jaccard |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for keep, label in dict.fromkeys((r["keep"], r["method"]) for r in sorted(tested, key=lambda r: -r["keep"])):
        group = [r for r in tested if (r["keep"], r["method"]) == (keep, label)]
        values = [r["accuracy"] for r in group if r["accuracy"] is not None]
        done = [r for r in group if r["accuracy"] is not None]
        parameters = round(statistics.mean(r["adapter_parameters"] for r in done)) if done else 0
        cells = (
            keep,
            label,
            f"{rates[keep, label]:g}",
            f"{parameters:,}",
            mean_error(values),
            len(values),
            likeness(done),
        )
        print(f"| {' | '.join(map(str, cells))} |")
    print()
    for keep, label in dict.fromkeys((r["keep"], r["method"]) for r in tested):
        print_places(f"{label}, K={keep}", [r for r in tested if (r["keep"], r["method"]) == (keep, label)])
    plans = known("smollm2")
    for label in dict.fromkeys(r["method"] for r in plans):
        group = [r for r in plans if r["method"] == label]
        print(f"\nSmolLM2, {label}: mean Jaccard {likeness(group)} over {len(group)} seeds")
        print_places(label, group)


def mean_error(values: list[float]) -> str:
    """Mean ± standard error of the mean."""
    if len(values) < 2:
        return ", ".join(f"{value:.4f}" for value in values)
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values) / len(values) ** 0.5:.4f}"


def likeness(group: list[dict[str, Any]]) -> str:
    """Mean and least Jaccard similarity over all pairs of seeds."""
    sets = [set(r["kept"]) for r in group]
    pairs = [len(a & b) / len(a | b) for a, b in itertools.combinations(sets, 2)]
    return f"{statistics.mean(pairs):.2f} (least {min(pairs):.2f})" if pairs else "–"


def print_places(label: str, group: list[dict[str, Any]]) -> None:
    """Print how often each projection and each layer is kept, as a share of its sites."""
    import re

    names = [name for r in group if r.get("kept") for name in r["kept"]]
    projections = Counter(re.sub(r"^.*?\.\d+\.", "", name) for name in names)
    layers = Counter(int(match.group(1)) for name in names if (match := re.search(r"\.(\d+)\.", name)))
    print(f"{label}: " + ", ".join(f"{p} {n}" for p, n in projections.most_common()), end="; layers ")
    print(" ".join(f"{layer}:{layers[layer]}" for layer in sorted(layers)))


if __name__ == "__main__":
    main()
