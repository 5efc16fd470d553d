"""Sentences with a label: tokens, batches, model and accuracy."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from weightlora.errors import DataError

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

    Raises:
        DataError: There is no such model.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return AutoModelForSequenceClassification.from_pretrained(str(path), num_labels=labels)
        except (OSError, ValueError) as error:
            raise DataError(f"cannot load a classifier from {path}: {str(error).splitlines()[0]}") from error


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; one without a padding token pads with the end of the text.

    Raises:
        DataError: There is no such tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot load a tokenizer from {path}: {str(error).splitlines()[0]}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple[str, int]], *, max_length: int) -> list[Row]:
    """Return one dict of token ids, mask and label a sentence, cut off at ``max_length`` tokens, not padded."""
    tokens = tokenizer([text for text, _ in rows], truncation=True, max_length=max_length)
    keys = [key for key in tokens if key != "length"]
    return [{**{k: tokens[k][i] for k in keys}, "labels": label} for i, (_, label) in enumerate(rows)]


def shuffled_batches(
    rows: Sequence[Row], collate: Callable[[list[Row]], Any], *, batch_size: int, count: int, seed: int
) -> list[Row]:
    """Return ``count`` batches of distinct rows in a random order, fewer where the rows run out.

    Args:
        rows: As :func:`encode` makes them.
        collate: Pads a list of rows to one batch, such as ``DataCollatorWithPadding(tokenizer)``.
        batch_size: Rows a batch.
        count: Batches wanted.
        seed: Decides the order.
    """
    order = random.Random(seed).sample(range(len(rows)), min(len(rows), batch_size * count))
    pieces = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [dict(collate([rows[i] for i in piece])) for piece in pieces]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of rows whose largest logit is the label, in [0, 1]; a ``compute_metrics`` of the Trainer."""
    logits: np.ndarray[Any, Any] = prediction.predictions  # pyright: ignore[reportAssignmentType]
    return {"accuracy": float((logits.argmax(axis=-1) == prediction.label_ids).mean())}
