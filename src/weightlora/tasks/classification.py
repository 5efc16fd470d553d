"""Classification and regression of texts or pairs of texts: tokens, model, trainer and GLUE's metrics."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from weightlora.errors import require_extra
from weightlora.tasks._values import check_texts, given_names, read_labels
from weightlora.tasks.base import Place, PreparedTask, RowOptions, Task
from weightlora.tasks.pretrained import load_pretrained

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from datasets import Dataset, DatasetDict
    from transformers import (
        EvalPrediction,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

Row = dict[str, Any]
TASK_TYPE = "SEQ_CLS"


def arguments_class() -> type[TrainingArguments]:
    """Return the class of the training arguments."""
    from transformers import TrainingArguments

    return TrainingArguments


def check_rows(task: Task, rows: Dataset, place: Place) -> None:
    """Raise where a text or a label is missing, or a label is none that the task allows.

    Raises:
        DataError: With the value found, the file and the row.
    """
    check_texts(task, rows, place, ("text", "pair"))
    read_labels(rows[task.columns["label"]][:], given_names(task, rows), place)


def head(task: Task, rows: DatasetDict) -> dict[str, Any]:
    """Return what ``from_pretrained`` is told of a fresh head for the task's labels, or for one number."""
    names = label_names(task, rows)
    if not names:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }


def prepare(task: Task, rows: DatasetDict, tokenizer: PreTrainedTokenizerBase, options: RowOptions) -> PreparedTask:
    """Return the task with its texts cut off at ``options.max_length`` tokens and its labels numbered.

    Raises:
        DataError: A label is not among those of the head, or is no number in a regression.
        MissingPackageError: The metrics' package is not installed.
    """
    require_extra("sklearn", "train")  # before the training, not after it
    names = label_names(task, rows)
    columns = task.columns

    def encode_rows(batch: dict[str, list[Any]], split: str) -> dict[str, Any]:
        pair = batch[columns["pair"]] if "pair" in columns else None
        tokens = tokenizer(batch[columns["text"]], pair, truncation=True, max_length=options.max_length)
        return {**tokens, "labels": read_labels(batch[columns["label"]], names, Place(f"the split {split!r}"))}

    encoded: dict[str, Dataset] = {
        str(split): part.map(
            partial(encode_rows, split=str(split)),
            batched=True,
            remove_columns=part.column_names,
            desc=f"tokens, {split}",
        )
        for split, part in rows.items()
    }
    return PreparedTask(
        make_trainer=partial(_make_trainer, task, tokenizer, encoded),
        measure=lambda trainer: _measure(task, trainer, encoded),
    )


def label_names(task: Task, rows: DatasetDict) -> tuple[str, ...]:
    """Return the labels in the order of their numbers; () for a regression.

    They are the task's own, else those that the training rows' ``ClassLabel`` names.
    """
    names = given_names(task, rows["train"])
    assert names is not None, "load_rows numbers the labels"
    return names


def score(metrics: Sequence[str], predictions: Any, references: Any) -> dict[str, float]:
    """Return GLUE's official metrics: accuracy, F1 of label 1, Matthews correlation, Pearson's and Spearman's.

    Args:
        metrics: Their names.
        predictions: Logits of shape (rows, labels), or numbers of shape (rows, 1) in a regression.
        references: Label numbers, or numbers, of shape (rows,).

    Example:
        >>> import numpy
        >>> score(["accuracy", "f1"], numpy.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]]), [1, 1, 1])
        {'accuracy': 0.6666666666666666, 'f1': 0.8}
    """
    from scipy import stats
    from sklearn import metrics as sk

    measures: dict[str, Callable[[Any, Any], Any]] = {
        "accuracy": sk.accuracy_score,
        "f1": sk.f1_score,
        "matthews_correlation": sk.matthews_corrcoef,
        "pearson": lambda a, b: stats.pearsonr(a, b)[0],
        "spearman": lambda a, b: stats.spearmanr(a, b)[0],
    }
    guess = predictions.argmax(-1) if predictions.shape[-1] > 1 else predictions[:, 0]
    return {name: float(measures[name](references, guess)) for name in metrics}


def load_classifier(path: str | Path, *, labels: int, seed: int) -> PreTrainedModel:
    """Load a model with a fresh classification head.

    Args:
        path: A folder or a hub name.
        labels: How many classes.
        seed: Decides the head's random weights; the global generators are left as they were.

    Raises:
        DataError: There is no such model.
    """
    return load_pretrained("AutoModelForSequenceClassification", path, seed=seed, num_labels=labels)


def encode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple[str, int]], *, max_length: int) -> list[Row]:
    """Return a dict of token ids, mask and label for each sentence, cut off at ``max_length`` tokens, not padded."""
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
        count: The most batches.
        seed: Decides the order.
    """
    order = random.Random(seed).sample(range(len(rows)), min(len(rows), batch_size * count))
    pieces = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [dict(collate([rows[i] for i in piece])) for piece in pieces]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of rows whose largest logit is the label, in [0, 1]; a ``compute_metrics`` of the Trainer."""
    logits: np.ndarray[Any, Any] = prediction.predictions  # pyright: ignore[reportAssignmentType]
    return {"accuracy": float((logits.argmax(axis=-1) == prediction.label_ids).mean())}


def _make_trainer(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    encoded: dict[str, Dataset],
    model: Any,
    arguments: TrainingArguments,
    callbacks: Sequence[TrainerCallback],
) -> Trainer:
    from transformers import DataCollatorWithPadding, Trainer

    # A decoder's head reads the last token that is not padding. Trainer.train() sets its id; selection runs before.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=encoded["train"],
        eval_dataset=next((part for split, part in encoded.items() if split != "train"), None),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=lambda p: score(task.metrics, p.predictions, p.label_ids),
        callbacks=list(callbacks),
    )
    # The loss is a mean over rows, whatever the Trainer concludes from the model's **kwargs. Without this line it sums
    # the gradients of accumulated batches instead of averaging them.
    trainer.model_accepts_loss_kwargs = False
    return trainer


def _measure(task: Task, trainer: Trainer, encoded: dict[str, Dataset]) -> dict[str, float]:
    measured: dict[str, float] = {}
    for split, part in encoded.items():
        if split != "train":
            found = trainer.evaluate(part, metric_key_prefix=split)  # pyright: ignore[reportArgumentType]
            measured |= {f"{split}_{name}": found[f"{split}_{name}"] for name in (*task.metrics, "loss")}
    return measured
