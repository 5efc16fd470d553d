"""Sentences with a label: tokens, batches, model and accuracy."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, Any]


def load_classifier(path: str | Path, *, labels: int, seed: int) -> PreTrainedModel:
    """Load a model with a fresh classification head.

    Args:
        path: A folder or a hub name.
        labels: How many classes.
        seed: Decides the head's random weights; the global generators are left as they were.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(str(path), num_labels=labels)


def encode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple[str, int]], *, max_length: int) -> list[Row]:
    """Return one dict of token ids, mask and label a sentence, cut off at ``max_length`` tokens, not padded."""
    tokens = tokenizer([text for text, _ in rows], truncation=True, max_length=max_length)
    keys = [key for key in tokens if key != "length"]
    return [{**{k: tokens[k][i] for k in keys}, "labels": label} for i, (_, label) in enumerate(rows)]


def shuffled_batches(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, batch_size: int, count: int, seed: int
) -> list[Row]:
    """Return ``count`` padded batches of distinct rows in a random order, fewer where the rows run out."""
    from transformers import DataCollatorWithPadding

    collate = DataCollatorWithPadding(tokenizer)
    order = random.Random(seed).sample(range(len(rows)), min(len(rows), batch_size * count))
    pieces = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [dict(collate([rows[i] for i in piece])) for piece in pieces]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of rows whose largest logit is the label, in [0, 1]; a ``compute_metrics`` of the Trainer."""
    logits: np.ndarray[Any, Any] = prediction.predictions  # pyright: ignore[reportAssignmentType]
    return {"accuracy": float((logits.argmax(axis=-1) == prediction.label_ids).mean())}
