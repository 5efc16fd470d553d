"""Supervised fine-tuning of a language model: TRL's SFTTrainer on prompt and completion, and what it then answers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from weightlora.errors import DataError, OptionError, WeightLoraWarning
from weightlora.tasks._judge import judge_model
from weightlora.tasks._prompts import solves, to_prompts
from weightlora.tasks.base import Prepared, RowOptions, Task
from weightlora.tasks.pretrained import load_pretrained

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import DatasetDict
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
    from trl import SFTConfig, SFTTrainer

TASK_TYPE = "CAUSAL_LM"


def _judged(
    name: str, dataset: str, subset: str | None, metrics: tuple[str, ...], split: str = "validation", **columns: str
) -> Task:
    return Task(name, "completion", columns, metrics, dataset, subset, (split,), options={"harness": name})


_ACC = ("acc", "acc_norm")
_GSM8K = ("exact_match_strict_match", "exact_match_flexible_extract")
_HELLASWAG = {"activity": "activity_label", "ctx_a": "ctx_a", "ctx_b": "ctx_b", "endings": "endings", "label": "label"}
_ARC = {"question": "question", "choices": "choices", "answer": "answerKey"}

#: ``options["harness"]`` names the task of lm-evaluation-harness that judges, and the metrics are the harness's;
#: ``include_path``, ``limit`` and ``num_fewshot`` beside it are those of :func:`weightlora.tasks._judge.judge`.
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
    # Its rows are made, not loaded; any generator will do: dataset_name reasoning_gym/gcd.
    Task(
        *("reasoning", "completion", {role: role for role in ("prompt", "completion", "entry")}, ("exact_match",)),
        "reasoning_gym/chain_sum",
    ),
    Task("completion", "completion", {"prompt": "prompt", "completion": "completion"}, ("exact_match",)),
    Task("chat", "completion", {"messages": "messages"}, ("exact_match",)),
)


def arguments_class() -> type[SFTConfig]:
    """Return the class of the training arguments."""
    from trl import SFTConfig

    return SFTConfig


def load_model(
    path: str | Path,
    task: Task,  # noqa: ARG001  # every kind of task is loaded by the same call
    rows: DatasetDict,  # noqa: ARG001
    *,
    seed: int,
    **from_pretrained: Any,
) -> PreTrainedModel:
    """Return a language model.

    Args:
        path: A folder or a hub name.
        task: The task; nothing of the model depends on it.
        rows: Its rows; nor on them.
        seed: Decides weights that the file lacks; the global generators are left as they were.
        from_pretrained: Passed on, such as ``dtype`` or ``gguf_file``.

    Raises:
        DataError: There is no such model.
    """
    return load_pretrained("AutoModelForCausalLM", path, seed=seed, **from_pretrained)


def prepare(task: Task, rows: DatasetDict, tokenizer: PreTrainedTokenizerBase, options: RowOptions) -> Prepared:
    """Return the task with its rows as prompts and completions, conversations where the tokenizer has a chat template.

    Args:
        task: The measure is the harness's where ``options["harness"]`` names a task of it, else the share of greedy
            answers that are right.
        rows: ``"train"`` and the evaluation splits.
        tokenizer: The model's.
        options: ``max_length`` of prompt and completion together, and ``max_target_length`` of an answer.

    Raises:
        DataError: A row is not as the task needs it.
    """
    chat = tokenizer.chat_template is not None
    examples = {str(split): to_prompts(task, rows[split], str(split), chat=chat) for split in rows}
    seen = {split: some for split, some in examples.items() if split != "train"}

    def make_trainer(model: Any, arguments: TrainingArguments, callbacks: Sequence[TrainerCallback]) -> Trainer:
        from trl import SFTConfig, SFTTrainer

        assert isinstance(arguments, SFTConfig)
        if arguments.completion_only_loss is None:
            arguments.completion_only_loss = True
        if arguments.max_length == SFTConfig.max_length:  # as it was made: the user did not say
            arguments.max_length = options.max_length
        try:
            trainer = SFTTrainer(
                model=model,
                args=arguments,
                train_dataset=examples["train"],
                eval_dataset=seen if len(seen) > 1 else next(iter(seen.values()), None),  # pyright: ignore[reportArgumentType]
                processing_class=tokenizer,
                callbacks=list(callbacks),
            )
        except ValueError as error:  # what TRL refuses, such as an adapter on the output head
            raise OptionError(" ".join(str(error).split())) from error
        if not arguments.packing:
            _check_room(trainer, {split: len(some) for split, some in examples.items()}, arguments.max_length)
        return trainer

    def measure(trainer: Trainer) -> dict[str, float]:
        batch_size = trainer.args.per_device_eval_batch_size
        if "harness" in task.options:
            asked = {key: task.options[key] for key in ("include_path", "limit", "num_fewshot") if key in task.options}
            return judge_model(trainer.model, tokenizer, [task.options["harness"]], batch_size=batch_size, **asked)
        numbers: dict[str, float] = {}
        for split, some in seen.items():
            answers = generate(
                *(trainer.model, tokenizer, [_encode(tokenizer, dict(row)) for row in some]),
                batch_size=batch_size,
                max_new_tokens=options.max_target_length,
            )
            right = [_is_right(answer.strip(), dict(row)) for answer, row in zip(answers, some, strict=True)]
            numbers[f"{split}_exact_match"] = sum(right) / len(right)
        return numbers

    return Prepared(make_trainer, measure)


def _check_room(trainer: SFTTrainer, given: Mapping[str, int], max_length: int | None) -> None:
    """Say which rows TRL dropped because their prompt fills ``max_length``: it does so without a word."""
    evaluated: Any = trainer.eval_dataset
    splits = evaluated if isinstance(evaluated, dict) else {split: evaluated for split in given if split != "train"}
    for split, rows in {"train": trainer.train_dataset, **splits}.items():
        kept: list[list[int]] = rows["input_ids"]  # pyright: ignore
        dropped, full = given[split] - len(kept), sum(len(ids) == max_length for ids in kept)
        if not kept:
            raise DataError(f"the prompts of the split {split!r} fill max_length={max_length}; raise max_length")
        if dropped or full:
            warnings.warn(
                f"max_length={max_length} drops {dropped} of {given[split]} rows of the split {split!r}, whose prompts "
                f"fill it, and cuts up to {full} completions; raise max_length",
                WeightLoraWarning,
                stacklevel=3,
            )


def _is_right(answer: str, row: Mapping[str, Any]) -> bool:
    if "entry" in row:
        return solves(answer, row["entry"])
    completion = row["completion"]
    return answer == (completion if isinstance(completion, str) else completion[-1]["content"]).strip()


# -- answers ---------------------------------------------------------------------------------------------------------


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """Return the likeliest continuation of each prompt, token by token, without special tokens.

    Args:
        model: A language model, with or without adapters.
        tokenizer: Its tokenizer; it must have a padding token.
        prompts: Their tokens.
        batch_size: Prompts at once; they are sorted by length, and padded on the left.
        max_new_tokens: Where an answer ends that has not ended itself.
    """
    import torch
    from tqdm import tqdm
    from transformers import GenerationConfig

    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=_ends(model, tokenizer),
    )
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # the largest first: what fits, fits to the end
    answers = [""] * len(prompts)
    training = model.training
    model.eval()
    try:
        for start in tqdm(range(0, len(order), batch_size), desc="answers", disable=None):
            some = order[start : start + batch_size]
            batch = tokenizer.pad(
                {"input_ids": [list(prompts[i]) for i in some]}, padding_side="left", return_tensors="pt"
            ).to(model.device)
            with torch.no_grad():
                ids = model.generate(**batch, generation_config=greedy, use_cache=True)
            texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, text in zip(some, texts, strict=True):
                answers[i] = str(text)
    finally:
        model.train(training)
    return answers


def _encode(tokenizer: Any, row: Mapping[str, Any]) -> list[int]:
    """The tokens of a row's prompt, up to where the answer starts."""
    if isinstance(row["prompt"], str):
        return tokenizer(row["prompt"])["input_ids"]
    options = {"add_generation_prompt": True, "return_dict": True, **row["chat_template_kwargs"]}
    return tokenizer.apply_chat_template(row["prompt"], **options)["input_ids"]


def _ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the tokenizer's, which is trained on, and those that the model came with."""
    known: Any = model.generation_config.eos_token_id
    own: Any = tokenizer.eos_token_id
    return sorted({own, *(known if isinstance(known, list) else [known])} - {None})
