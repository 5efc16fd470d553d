"""Extractive question answering: the span of a context that answers a question, as in SQuAD v1.1 and v2.0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from weightlora.errors import DataError, OptionError
from weightlora.tasks._squad_metric import Span, Window, best_span, null_score, squad_scores, squad_v2_scores
from weightlora.tasks._values import check_texts
from weightlora.tasks.base import Place, PreparedTask, RowOptions, Task

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import (
        PreTrainedTokenizerBase,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

TASK_TYPE = "QUESTION_ANS"

#: What the metrics need of a window and the model does not: its tokens' characters, its "no answer" token, its row.
_EXTRA_COLUMNS = ("offsets", "cls", "row")
#: The share of rows whose answer may be elsewhere than its ``answer_start`` says; real data has a few.
_MISPLACED = 0.01


def arguments_class() -> type[TrainingArguments]:
    """Return the class of the training arguments."""
    from transformers import TrainingArguments

    return TrainingArguments


def check_rows(task: Task, rows: Dataset, place: Place) -> None:
    """Raise where a question or context is no text, or the answers are not of SQuAD's form, at their places.

    Raises:
        DataError: With the value found, the file and the row.
    """
    check_texts(task, rows, place, ("question", "context"))
    _check_answers(task, rows, place)


def _check_answers(task: Task, rows: Dataset, place: Place) -> None:
    wrong: list[int] = []
    columns = (rows[task.columns[role]] for role in ("context", "answers"))
    for number, (context, answers) in enumerate(zip(*columns, strict=True)):
        if not _well_formed(answers):
            raise DataError(
                f"{place.row(number)} has the answers {shorten(repr(answers), 100)}; "
                'each row needs {"text": ["..."], "answer_start": [0]}, as many of both'
            )
        if not answers["text"]:
            if not task.options.get("unanswerable"):
                raise DataError(f"{place.row(number)} has no answer; drop such rows or take task=squad_v2")
        elif not context.startswith(answers["text"][0], answers["answer_start"][0]):
            wrong.append(number)
    if len(wrong) > _MISPLACED * len(rows):
        raise DataError(
            f"{len(wrong)} of {len(rows)} answers in {place.name} are not at their answer_start, such as that of "
            f"{place.row(wrong[0])}; it counts the characters of the context from 0"
        )


def prepare(task: Task, rows: DatasetDict, tokenizer: PreTrainedTokenizerBase, options: RowOptions) -> PreparedTask:
    """Return the task with every context cut into overlapping windows of ``options.max_length`` tokens.

    Args:
        task: Its ``options["unanswerable"]`` says that some questions have no answer, as in SQuAD v2.0.
        rows: ``"train"`` and the evaluation splits.
        tokenizer: A fast one.
        options: ``max_length`` and ``doc_stride``.

    Raises:
        DataError: The answers are not of SQuAD's form, or not at their ``answer_start``.
        OptionError: The tokenizer is slow, or a window would add nothing to the one before (``doc_stride``).
    """
    if not tokenizer.is_fast:
        raise OptionError(
            f"{type(tokenizer).__name__} does not give the characters of a token; give a model with a fast tokenizer"
        )
    for split in rows:
        _check_answers(task, rows[split], Place(f"the split {str(split)!r}"))
    train = _windows(task, rows["train"], tokenizer, options, extra=False)
    measured = {str(split): rows[split] for split in rows if split != "train"}
    windows = {split: _windows(task, some, tokenizer, options, extra=True) for split, some in measured.items()}
    seen = {split: some.remove_columns(list(_EXTRA_COLUMNS)) for split, some in windows.items()}
    return PreparedTask(
        make_trainer=partial(_make_trainer, tokenizer, train, seen),
        measure=partial(_measure, task, measured, windows, seen),
    )


def _make_trainer(
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    seen: Mapping[str, Dataset],
    model: Any,
    arguments: TrainingArguments,
    callbacks: Sequence[TrainerCallback],
) -> Trainer:
    from transformers import DataCollatorWithPadding, Trainer

    return Trainer(
        model=model,
        args=arguments,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=train,  # pyright: ignore[reportArgumentType]
        eval_dataset=dict(seen) if len(seen) > 1 else next(iter(seen.values()), None),  # pyright: ignore[reportArgumentType]
        processing_class=tokenizer,
        callbacks=list(callbacks),
        preprocess_logits_for_metrics=_span_logits,  # pyright: ignore[reportArgumentType]  # tuples pass too
    )


def _measure(
    task: Task,
    measured: Mapping[str, Dataset],
    windows: Mapping[str, Dataset],
    seen: Mapping[str, Dataset],
    trainer: Trainer,
) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for split, some in measured.items():
        found = trainer.predict(seen[split], metric_key_prefix=split)  # pyright: ignore[reportArgumentType]
        scores = _scores(task, some, windows[split], found.predictions)
        assert found.metrics is not None
        numbers |= {f"{split}_{name}": score for name, score in scores.items()}
        numbers[f"{split}_loss"] = found.metrics[f"{split}_loss"]  # of windows; models count padding as places, too
    return numbers


def _span_logits(outputs: Any, _labels: Any) -> Any:
    """Return the two logits only: an encoder-decoder's other outputs, its states, are large."""
    return outputs[:2]


def _well_formed(answers: Any) -> bool:
    if not isinstance(answers, dict):
        return False
    texts, starts = answers.get("text"), answers.get("answer_start")
    if not (isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)):
        return False
    return all(isinstance(text, str) and text for text in texts) and all(
        isinstance(start, int) and not isinstance(start, bool) and start >= 0 for start in starts
    )


def _windows(
    task: Task, rows: Dataset, tokenizer: PreTrainedTokenizerBase, options: RowOptions, *, extra: bool
) -> Dataset:
    """Return a row for each window: tokens, positions of the answer and, with ``extra``, what the metrics need."""
    cut = partial(_cut, columns=task.columns, tokenizer=tokenizer, options=options, extra=extra)
    return rows.map(cut, batched=True, with_indices=True, remove_columns=rows.column_names, desc="tokens")


def _cut(
    batch: Any, numbers: list[int], columns: Any, tokenizer: Any, options: RowOptions, extra: bool
) -> dict[str, list[Any]]:
    questions = [text.lstrip() for text in batch[columns["question"]]]  # SQuAD has some with thousands of blanks
    _check_lengths(questions, tokenizer, options)
    right = tokenizer.padding_side == "right"
    texts = (questions, batch[columns["context"]])
    tokens = tokenizer(
        *(texts if right else reversed(texts)),
        truncation="only_second" if right else "only_first",
        max_length=options.max_length,
        stride=options.doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding=False if right else "max_length",  # later padding on the left would shift the positions
    )
    samples, every_offset = tokens.pop("overflow_to_sample_mapping"), tokens.pop("offset_mapping")
    made: dict[str, list[Any]] = {key: list(values) for key, values in tokens.items()}
    added = ("start_positions", "end_positions", *(_EXTRA_COLUMNS if extra else ()))
    made |= {key: [] for key in added}
    for i, sample in enumerate(samples):
        ours = [part == int(right) for part in tokens.sequence_ids(i)]
        offsets = [offset if our else None for offset, our in zip(every_offset[i], ours, strict=True)]
        cls = _cls_position(tokens["input_ids"][i], tokenizer)
        start, end = _positions(batch[columns["answers"]][sample], offsets, cls)
        for key, value in zip(added, (start, end, offsets, cls, numbers[sample]), strict=False):  # two, or all five
            made[key].append(value)
    return made


def _check_lengths(questions: Sequence[str], tokenizer: Any, options: RowOptions) -> None:
    longest = max(len(ids) for ids in tokenizer(questions, add_special_tokens=False)["input_ids"])
    left = options.max_length - tokenizer.num_special_tokens_to_add(pair=True) - longest
    if options.doc_stride >= left:
        raise OptionError(
            f"doc_stride={options.doc_stride} must be smaller than the {left} tokens that max_seq_length="
            f"{options.max_length} leaves after a question of {longest}; lower doc_stride or raise max_seq_length"
        )


def _cls_position(ids: list[int], tokenizer: Any) -> int:
    """Return the position of "no answer": the CLS token, else the start of the text, as in ``run_qa.py``."""
    for special in (tokenizer.cls_token_id, tokenizer.bos_token_id):
        if special is not None and special in ids:
            return ids.index(special)
    return 0


def _positions(answers: Any, offsets: Sequence[Any], cls: int) -> tuple[int, int]:
    """First and last token of the first answer; twice ``cls`` where this window does not hold the whole of it."""
    if not answers["text"]:
        return cls, cls
    start = answers["answer_start"][0]
    end = start + len(answers["text"][0])
    touched = [i for i, offset in enumerate(offsets) if offset and offset[0] < end and offset[1] > start]
    if not touched or offsets[touched[0]][0] > start or offsets[touched[-1]][1] < end:
        return cls, cls
    return touched[0], touched[-1]


def _scores(task: Task, rows: Dataset, windows: Dataset, logits: Any) -> dict[str, float]:
    """Return the metrics of a split from the start and end logits of its windows."""
    by_row: list[list[Window]] = [[] for _ in range(len(rows))]
    for window, start, end in zip(windows, *logits, strict=True):
        seen: Any = window
        length = len(seen["offsets"])  # beyond it the batch was padded
        found = Window(start[:length].tolist(), end[:length].tolist(), seen["offsets"], seen["cls"])
        by_row[seen["row"]].append(found)
    contexts = rows[task.columns["context"]]
    spans: list[Span] = [best_span(context, some) for context, some in zip(contexts, by_row, strict=True)]
    golds: list[list[str]] = [answers["text"] for answers in rows[task.columns["answers"]]]
    if not task.options.get("unanswerable"):
        return squad_scores([span.text for span in spans], golds)
    return squad_v2_scores(spans, [null_score(some) for some in by_row], golds)
