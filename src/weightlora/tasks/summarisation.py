"""Summaries by an encoder-decoder, as of XSum and CNN/DailyMail, and their ROUGE."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from weightlora.tasks.base import Prepared, RowOptions, Task
from weightlora.tasks.pretrained import load_pretrained

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import Dataset, DatasetDict
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        Seq2SeqTrainingArguments,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

TASK_TYPE = "SEQ_2_SEQ_LM"

#: Blanks after a sentence's end. Abbreviations are cut too, on both sides alike, and it costs no download as nltk does.
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def arguments_class() -> type[Seq2SeqTrainingArguments]:
    """Return the class of the training arguments."""
    from transformers import Seq2SeqTrainingArguments

    return Seq2SeqTrainingArguments


def load_model(
    path: str | Path,
    task: Task,  # noqa: ARG001  # every kind of task is loaded by the same call
    rows: DatasetDict,  # noqa: ARG001
    *,
    seed: int,
    **from_pretrained: Any,
) -> PreTrainedModel:
    """Return an encoder-decoder with its language-model head.

    Args:
        path: A folder or a hub name.
        task: The task.
        rows: Its rows; nothing of the model depends on them.
        seed: Decides weights that the file lacks; the global generators are left as they were.
        from_pretrained: Passed on, such as ``dtype``.

    Raises:
        DataError: There is no such model.
    """
    return load_pretrained("AutoModelForSeq2SeqLM", path, seed=seed, **from_pretrained)


def prepare(task: Task, rows: DatasetDict, tokenizer: PreTrainedTokenizerBase, options: RowOptions) -> Prepared:
    """Return the task with its documents and summaries as tokens, each cut off at its own length.

    Args:
        task: The roles are ``document`` and ``summary``.
        rows: ``"train"`` and the evaluation splits.
        tokenizer: The model's.
        options: ``max_length`` of a document, ``max_target_length`` of a summary, ``num_beams`` of the search.
    """
    tokens = {str(split): _encode(task, rows[split], tokenizer, options) for split in rows}
    seen = {split: some for split, some in tokens.items() if split != "train"}

    def make_trainer(model: Any, arguments: TrainingArguments, callbacks: Sequence[TrainerCallback]) -> Trainer:
        from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

        assert isinstance(arguments, Seq2SeqTrainingArguments)
        arguments.predict_with_generate = True
        return Seq2SeqTrainer(
            model=model,
            args=arguments,
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
            train_dataset=tokens["train"],  # pyright: ignore[reportArgumentType]
            eval_dataset=seen if len(seen) > 1 else next(iter(seen.values()), None),  # pyright: ignore[reportArgumentType]
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )

    def measure(trainer: Trainer) -> dict[str, float]:
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
            # The whole summaries, not their cut-off tokens: a short max_target_length must not flatter.
            scores = rouge(found, rows[split][task.columns["summary"]])
            numbers |= {f"{split}_{name}": score for name, score in scores.items()}
        return numbers

    return Prepared(make_trainer, measure)


def _encode(task: Task, rows: Dataset, tokenizer: Any, options: RowOptions) -> Dataset:
    def encode(batch: Any) -> dict[str, Any]:
        source = tokenizer(
            batch[task.columns["document"]],
            truncation=True,
            max_length=options.max_length,
            return_token_type_ids=False,  # encoder-decoders have none
        )
        target = tokenizer(
            text_target=batch[task.columns["summary"]], truncation=True, max_length=options.max_target_length
        )
        return {**source, "labels": target["input_ids"]}

    return rows.map(encode, batched=True, remove_columns=rows.column_names, desc="tokens")


def rouge(found: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Return the mean F-measures of ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum, in percent, with stemmed words.

    Args:
        found: The generated summaries.
        wanted: The reference of each.

    Example:
        >>> rouge(["the cat sat"], ["the cat ran"])["rouge2"]
        50.0
    """
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    scorer = RougeScorer(names, use_stemmer=True)
    # ROUGE-Lsum compares line by line; the other three take a new line for a blank.
    scores = [scorer.score(_lines(gold), _lines(text)) for text, gold in zip(found, wanted, strict=True)]
    return {name: 100.0 * sum(score[name].fmeasure for score in scores) / len(scores) for name in names}


def _lines(text: str) -> str:
    """Return the text with one sentence a line."""
    return _SENTENCE_END.sub("\n", text.strip())
