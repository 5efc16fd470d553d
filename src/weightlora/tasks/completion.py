"""Fine-tuning of a language model with TRL's SFTTrainer: on prompts with completions, on chats or on plain text."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from weightlora.errors import DataError, OptionError, WeightLoraWarning, require_extra
from weightlora.tasks._answers import answered, end_tokens, generate, judge_model
from weightlora.tasks._prompts import check_prompts, check_whole_texts, solves, to_prompts, to_texts
from weightlora.tasks._values import check_texts
from weightlora.tasks.base import HELD_OUT, PreparedTask, RowOptions, Task

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    from weightlora.tasks.base import Place

TASK_TYPE = "CAUSAL_LM"


def _judged(
    name: str, dataset: str, subset: str | None, metrics: tuple[str, ...], split: str = "validation", **columns: str
) -> Task:
    return Task(name, "completion", columns, metrics, dataset, subset, (split,), options={"harness": name})


_ACC = ("acc", "acc_norm")
_GSM8K = ("exact_match_strict_match", "exact_match_flexible_extract")
_HELLASWAG = {"activity": "activity_label", "ctx_a": "ctx_a", "ctx_b": "ctx_b", "endings": "endings", "label": "label"}
_ARC = {"question": "question", "choices": "choices", "answer": "answerKey"}

#: ``options["harness"]`` names the task of lm-evaluation-harness that measures it, and the metrics are the harness's.
#: Further options, ``include_path``, ``limit`` and ``num_fewshot``, go to :func:`judge_model`.
TASKS = (
    # The same rows as allenai/math_qa, which is a script: datasets reads none since its version 4.
    _judged("mathqa", "regisss/math_qa", None, _ACC, problem="Problem", options="options", correct="correct"),
    _judged("gsm8k", "openai/gsm8k", "main", _GSM8K, "test", question="question", answer="answer"),
    _judged("hellaswag", "Rowan/hellaswag", None, _ACC, **_HELLASWAG),
    _judged("boolq", "google/boolq", None, ("acc",), passage="passage", question="question", answer="answer"),
    _judged(
        *("arc_challenge", "allenai/ai2_arc", "ARC-Challenge", _ACC),
        question="question",
        choices="choices",
        answer="answerKey",
    ),
    # Its rows are generated, not loaded; dataset_name=reasoning_gym/gcd takes another generator.
    Task(
        *("reasoning", "completion", {role: role for role in ("prompt", "completion", "entry")}, ("exact_match",)),
        "reasoning_gym/chain_sum",
    ),
    Task("completion", "completion", {"prompt": "prompt", "completion": "completion"}, ("exact_match",)),
    Task("chat", "completion", {"messages": "messages"}, ("exact_match",)),
    # Every token is predicted.
    Task("language_modelling", "completion", {"text": "text"}, ("loss", "perplexity"), lower_is_better=True),
)


def arguments_class() -> type[SFTConfig]:
    """Return the class of the training arguments."""
    require_extra("trl", "llm")
    from trl import SFTConfig

    return SFTConfig


def check_rows(task: Task, rows: Dataset, place: Place) -> None:
    """Raise where a row has no text, or no prompt and completion.

    Raises:
        DataError: With the value found, the file and the row.
    """
    if "text" in task.columns:
        check_whole_texts(task, rows, place)
        return
    check_prompts(task, rows, place)
    own = [role for role in ("prompt", "completion") if role in task.columns]
    check_texts(task, rows, place, [role for role in own if rows.features[task.columns[role]].dtype == "string"])


def prepare(task: Task, rows: DatasetDict, tokenizer: PreTrainedTokenizerBase, options: RowOptions) -> PreparedTask:
    """Return the task with its rows as TRL takes them: prompts with completions, conversations, or plain texts.

    Prompts and completions become conversations where the tokenizer has a chat template.

    Args:
        task: ``options["harness"]`` names the task of lm-evaluation-harness that measures it. Otherwise plain texts
            are measured by their loss, and all others by the share of greedy answers that are right.
        rows: ``"train"`` and the evaluation splits.
        tokenizer: The model's.
        options: ``max_length`` of a whole row, ``max_target_length`` of an answer, and ``teacher_forced``.

    Raises:
        DataError: A row is not as the task needs it.
        MissingPackageError: The harness measures the task and is not installed.
    """
    if "harness" in task.options:
        require_extra("lm_eval", "llm")
    chat = tokenizer.chat_template is not None
    examples = {
        str(split): to_texts(task, some, str(split))
        if "text" in task.columns
        else to_prompts(task, some, str(split), chat=chat)
        for split, some in rows.items()
    }
    measured = {split: some for split, some in examples.items() if split != "train"}
    measure = partial(_measure_answers, tokenizer, options, measured)
    if "text" in task.columns:
        measure = partial(_measure_loss, list(measured))
    elif options.teacher_forced:
        measure = partial(_measure_teacher_forced, tokenizer, list(measured))
    elif "harness" in task.options:
        measure = partial(_measure_by_harness, task, tokenizer, list(measured))
    return PreparedTask(partial(_make_trainer, tokenizer, options, examples), measure)


def _make_trainer(
    tokenizer: PreTrainedTokenizerBase,
    options: RowOptions,
    examples: Mapping[str, Dataset],
    model: Any,
    arguments: TrainingArguments,
    callbacks: Sequence[TrainerCallback],
) -> Trainer:
    from trl import SFTConfig, SFTTrainer

    assert isinstance(arguments, SFTConfig)
    measured = {split: some for split, some in examples.items() if split != "train"}
    if "text" in examples["train"].column_names:
        arguments.dataset_text_field = "text"
    elif arguments.completion_only_loss is None:
        arguments.completion_only_loss = True
    option = "max_length"  # TRL's own, where the user set it
    if arguments.max_length == SFTConfig.max_length:
        arguments.max_length, option = options.max_length, "max_seq_length"
    try:
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=examples["train"],
            eval_dataset=measured if len(measured) > 1 else next(iter(measured.values()), None),  # pyright: ignore[reportArgumentType]
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
    except ValueError as error:  # what TRL refuses, such as an adapter on the output head
        raise OptionError(" ".join(str(error).split())) from error
    if not arguments.packing:
        _check_lengths(trainer, {split: len(some) for split, some in examples.items()}, arguments.max_length, option)
    return trainer


def _check_lengths(trainer: SFTTrainer, given: Mapping[str, int], max_length: int | None, option: str) -> None:
    """Warn of rows that TRL drops silently because their prompt fills ``max_length``, and of those that it cuts.

    ``option`` is what the user sets it with.
    """
    for split, rows in {"train": trainer.train_dataset, **_tokenised(trainer, given)}.items():
        kept: list[list[int]] = rows["input_ids"]  # pyright: ignore
        dropped, full = given[split] - len(kept), sum(len(ids) == max_length for ids in kept)
        if not kept:
            raise DataError(f"the prompts of the split {split!r} fill {option}={max_length}; raise {option}")
        lost = [f"drops {dropped} rows whose prompts fill it"] if dropped else []
        lost += [f"cuts up to {full} rows at their end"] if full else []
        if lost:
            text = f"of {given[split]} rows of the split {split!r}, {option}={max_length} {' and '.join(lost)}"
            warnings.warn(f"{text}; raise {option}", WeightLoraWarning, stacklevel=3)


def _tokenised(trainer: Trainer, splits: Iterable[str]) -> dict[str, Any]:
    """The measured splits as the trainer holds them: one data set, a dict of several, or None."""
    held: Any = trainer.eval_dataset
    if isinstance(held, dict):
        return held  # pyright: ignore[reportUnknownVariableType]
    return {} if held is None else {split: held for split in splits if split != "train"}


# -- measures --------------------------------------------------------------------------------------------------------


def _measure_loss(splits: Iterable[str], trainer: Trainer) -> dict[str, float]:
    """Return the loss of each split and its perplexity, exp(loss), as ``run_clm.py`` of transformers does.

    The loss is the mean over batches of the mean over their tokens.
    """
    numbers: dict[str, float] = {}
    for split, rows in _tokenised(trainer, splits).items():
        loss = trainer.evaluate(rows, metric_key_prefix=split)[f"{split}_loss"]
        numbers |= {f"{split}_loss": loss, f"{split}_perplexity": math.exp(min(loss, 700.0))}  # no overflow
    return numbers


def _measure_teacher_forced(
    tokenizer: PreTrainedTokenizerBase, splits: Iterable[str], trainer: Trainer
) -> dict[str, float]:
    """Return the loss per answer token of each split, and the share of its answers that greedy decoding would write."""
    numbers: dict[str, float] = {}
    arguments: Any = trainer.args
    if arguments.packing or not arguments.completion_only_loss:
        raise OptionError(
            f"teacher_forced=True needs rows of one answer each, but packing={arguments.packing} and "
            f"completion_only_loss={arguments.completion_only_loss}; leave both out"
        )
    for split, rows in _tokenised(trainer, splits).items():
        found = answered(
            *(trainer.model, list(rows["input_ids"]), list(rows["labels"])),
            ends=end_tokens(trainer.model, tokenizer),
            batch_size=trainer.args.per_device_eval_batch_size,
        )
        numbers |= {f"{split}_loss": found.loss, f"{split}_exact_match": found.exact_match}
    return numbers


def _measure_by_harness(
    task: Task, tokenizer: PreTrainedTokenizerBase, splits: Iterable[str], trainer: Trainer
) -> dict[str, float]:
    """Return what the harness measures on its own rows, and the loss of training rows that are held out."""
    given = {key: task.options[key] for key in ("include_path", "limit", "num_fewshot") if key in task.options}
    batch_size = trainer.args.per_device_eval_batch_size
    numbers = judge_model(trainer.model, tokenizer, [task.options["harness"]], batch_size=batch_size, **given)
    held = _tokenised(trainer, splits)
    if HELD_OUT in held:
        name = f"{HELD_OUT}_loss"
        numbers[name] = trainer.evaluate(held[HELD_OUT], metric_key_prefix=HELD_OUT)[name]
    return numbers


def _measure_answers(
    tokenizer: PreTrainedTokenizerBase, options: RowOptions, splits: Mapping[str, Dataset], trainer: Trainer
) -> dict[str, float]:
    """Return the share of rows of each split whose greedy answer is right."""
    numbers: dict[str, float] = {}
    for split, rows in splits.items():
        answers = generate(
            *(trainer.model, tokenizer, [_encode(tokenizer, dict(row)) for row in rows]),
            batch_size=trainer.args.per_device_eval_batch_size,
            max_new_tokens=options.max_target_length,
        )
        right = [_is_right(answer.strip(), dict(row)) for answer, row in zip(answers, rows, strict=True)]
        numbers[f"{split}_exact_match"] = sum(right) / len(right)
    return numbers


def _is_right(answer: str, row: Mapping[str, Any]) -> bool:
    if "entry" in row:
        return solves(answer, row["entry"])
    completion = row["completion"]
    return answer == (completion if isinstance(completion, str) else completion[-1]["content"]).strip()


def _encode(tokenizer: Any, row: Mapping[str, Any]) -> list[int]:
    """Return the tokens of a row's prompt, up to where the answer starts."""
    if isinstance(row["prompt"], str):
        return tokenizer(row["prompt"])["input_ids"]
    options = {"add_generation_prompt": True, "return_dict": True, **row["chat_template_kwargs"]}
    return tokenizer.apply_chat_template(row["prompt"], **options)["input_ids"]
