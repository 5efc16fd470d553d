"""One run: base model, method and data → transformers ``Trainer`` → trained stock adapter and its numbers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from weightlora.fast.enable import enable_fast_lora
from weightlora.plan.plan import AdapterPlan
from weightlora.tasks.classification import Row, accuracy, load_classifier, shuffled_batches

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

    from weightlora.methods import Method


@dataclass(frozen=True)
class Settings:
    """What all methods of a comparison share."""

    model: Path
    """A folder (or hub name) that a classifier is loaded from."""
    labels: int = 2
    epochs: float = 1.0
    batch_size: int = 32
    lr: float = 1e-3
    seed: int = 0
    """Decides the fresh head, the order of the data and A's random start; equal seeds see equal data."""
    warmup_batches: int = 64
    """How many training batches a selecting method may look at."""
    fast: bool = False
    """Train with the step of :func:`weightlora.enable_fast_lora`."""


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    model: PeftModel
    plan: AdapterPlan
    accuracy: float
    selection_seconds: float
    training_seconds: float


def train_classifier(
    settings: Settings,
    method: Method,
    lora: LoraConfig,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Sequence[Row],
    test_rows: Sequence[Row],
    *,
    callbacks: Sequence[TrainerCallback] = (),
) -> Outcome:
    """Train one method and measure it on ``test_rows``.

    Args:
        settings: What the methods share.
        method: How the budget is spent.
        lora: The budget: plain LoRA on all candidates.
        tokenizer: Pads the batches.
        train_rows: As :func:`weightlora.tasks.classification.encode` makes them.
        test_rows: Rows that the accuracy is measured on.
        callbacks: Further callbacks, such as a progress bar.
    """
    base = load_classifier(settings.model, labels=settings.labels, seed=settings.seed)
    steps = round(settings.epochs * -(-len(train_rows) // settings.batch_size))
    collate = DataCollatorWithPadding(tokenizer)
    batches = shuffled_batches(
        train_rows, collate, batch_size=settings.batch_size, count=settings.warmup_batches, seed=settings.seed
    )
    start = time.perf_counter()
    model = method.attach(base, lora, batches, steps)
    if settings.fast:
        enable_fast_lora(model)
    selected = time.perf_counter()
    trainer = Trainer(
        model=model,  # pyright: ignore[reportArgumentType]  # a PeftModel is what the Trainer's docs pass
        args=_arguments(settings),
        train_dataset=list(train_rows),  # pyright: ignore[reportArgumentType]  # any indexable of rows will do
        eval_dataset=sorted(test_rows, key=lambda row: len(row["input_ids"])),  # pyright: ignore[reportArgumentType]
        data_collator=collate,
        compute_metrics=accuracy,
        callbacks=[*method.callbacks(), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)  # it prints raw dicts wherever there is no tqdm bar
    trainer.train()
    trained = time.perf_counter()
    measured: dict[str, Any] = trainer.evaluate()
    return Outcome(
        model=method.export(model),
        plan=method.plan,
        accuracy=measured["eval_accuracy"],
        selection_seconds=selected - start,
        training_seconds=trained - selected,
    )


def _arguments(settings: Settings) -> TrainingArguments:
    """Nothing is written: an adapter is saved from the outcome, whole, by whoever wants it."""
    return TrainingArguments(
        output_dir="runs/trainer",
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=128,
        learning_rate=settings.lr,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        weight_decay=1e-4,
        adam_beta2=0.99,
        seed=settings.seed,
        data_seed=settings.seed,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
