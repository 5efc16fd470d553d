"""Summarisation by an encoder-decoder, as in XSum and CNN/DailyMail, measured by ROUGE."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from weightlora.errors import require_extra
from weightlora.tasks._values import check_texts
from weightlora.tasks.base import PreparedTask, RowOptions, Task

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import (
        PreTrainedTokenizerBase,
        Seq2SeqTrainingArguments,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from weightlora.tasks.base import Place

TASK_TYPE = "SEQ_2_SEQ_LM"

#: Blanks after a sentence's end. It also cuts after abbreviations, in both texts alike; nltk would need a download.
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def arguments_class() -> type[Seq2SeqTrainingArguments]:
    """Return the class of the training arguments."""
    from transformers import Seq2SeqTrainingArguments

    return Seq2SeqTrainingArguments


def check_rows(task: Task, rows: Dataset, place: Place) -> None:
    """Raise where a document or a summary is no text.

    Raises:
        DataError: With the value found, the file and the row.
    """
    check_texts(task, rows, place, ("document", "summary"))


def prepare(task: Task, rows: DatasetDict, tokenizer: PreTrainedTokenizerBase, options: RowOptions) -> PreparedTask:
    """Return the task with its documents and summaries as tokens, each cut off at its own length.

    Args:
        task: The roles are ``document`` and ``summary``.
        rows: ``"train"`` and the evaluation splits.
        tokenizer: The model's.
        options: ``max_length`` of a document, ``max_target_length`` of a summary, ``num_beams`` of the search.

    Raises:
        MissingPackageError: The package of ROUGE is not installed.
    """
    require_extra("rouge_score", "train")  # before the training, not after it
    tokens = {str(split): _encode(task, rows[split], tokenizer, options) for split in rows}
    seen = {split: some for split, some in tokens.items() if split != "train"}
    references = {split: list(rows[split][task.columns["summary"]]) for split in seen}
    return PreparedTask(
        make_trainer=partial(_make_trainer, tokenizer, tokens["train"], seen),
        measure=partial(_measure, tokenizer, options, seen, references),
    )


def _make_trainer(
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    seen: Mapping[str, Dataset],
    model: Any,
    arguments: TrainingArguments,
    callbacks: Sequence[TrainerCallback],
) -> Trainer:
    from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

    assert isinstance(arguments, Seq2SeqTrainingArguments)
    arguments.predict_with_generate = True
    return Seq2SeqTrainer(
        model=model,
        args=arguments,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        train_dataset=train,  # pyright: ignore[reportArgumentType]
        eval_dataset=dict(seen) if len(seen) > 1 else next(iter(seen.values()), None),  # pyright: ignore[reportArgumentType]
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


def _measure(
    tokenizer: PreTrainedTokenizerBase,
    options: RowOptions,
    seen: Mapping[str, Dataset],
    references: Mapping[str, Sequence[str]],
    trainer: Trainer,
) -> dict[str, float]:
    """Return ROUGE of the generated summaries of each split."""
    from transformers import Seq2SeqTrainer

    assert isinstance(trainer, Seq2SeqTrainer)
    numbers: dict[str, float] = {}
    for split, some in seen.items():
        ids: Any = trainer.predict(
            some,  # pyright: ignore[reportArgumentType]
            max_length=options.max_target_length,
            num_beams=options.num_beams,
        ).predictions
        ids[ids == -100] = tokenizer.pad_token_id  # the Trainer's own padding between batches
        found: Any = tokenizer.batch_decode(ids, skip_special_tokens=True)
        # References are whole texts, not cut-off tokens: a short max_target_length must not raise the score.
        numbers |= {f"{split}_{name}": score for name, score in rouge(found, references[split]).items()}
    return numbers


def _encode(task: Task, rows: Dataset, tokenizer: Any, options: RowOptions) -> Dataset:
    tokens_of = partial(_tokens, task.columns, tokenizer, options)
    return rows.map(tokens_of, batched=True, remove_columns=rows.column_names, desc="tokens")


def _tokens(columns: Mapping[str, str], tokenizer: Any, options: RowOptions, batch: Any) -> dict[str, Any]:
    source = tokenizer(
        batch[columns["document"]],
        truncation=True,
        max_length=options.max_length,
        return_token_type_ids=False,  # encoder-decoders have none
    )
    target = tokenizer(text_target=batch[columns["summary"]], truncation=True, max_length=options.max_target_length)
    return {**source, "labels": target["input_ids"]}


def rouge(found: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Return the mean F-measures of ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum, each in [0, 1], with stemmed words.

    Args:
        found: The generated summaries.
        wanted: The reference of each.

    Example:
        >>> rouge(["the cat sat"], ["the cat ran"])["rouge2"]
        0.5
    """
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    scorer = RougeScorer(names, use_stemmer=True)
    # ROUGE-Lsum compares line by line; the other three treat a new line as a blank.
    scores = [scorer.score(_lines(gold), _lines(text)) for text, gold in zip(found, wanted, strict=True)]
    return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in names}


def _lines(text: str) -> str:
    """Return the text with one sentence on each line."""
    return _SENTENCE_END.sub("\n", text.strip())
