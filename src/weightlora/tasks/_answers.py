"""How answers of a language model are measured: generated, token by token given, or by lm-evaluation-harness.

Where every token of an answer is predicted from the true tokens before it, all are predicted right exactly where greedy
decoding writes that answer: up to the first wrong token both see the same tokens.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.errors import DataError, require_extra
from weightlora.tasks._prompts import template_options

if TYPE_CHECKING:
    from lm_eval.api.task import Task as HarnessTask
    from lm_eval.tasks import TaskManager
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

#: What PyTorch's cross entropy leaves out.
_NO_LABEL = -100


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
        batch_size: Prompts a batch. Prompts are sorted by length and padded on the left.
        max_new_tokens: The most tokens of an answer.
    """
    import torch
    from transformers import GenerationConfig

    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_tokens(model, tokenizer),
    )
    answers = [""] * len(prompts)
    for some in _batches(model, list(map(len, prompts)), batch_size):
        batch = tokenizer.pad(
            {"input_ids": [list(prompts[i]) for i in some]}, padding_side="left", return_tensors="pt"
        ).to(model.device)
        with torch.no_grad():
            ids = model.generate(**batch, generation_config=greedy, use_cache=True)
        texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(some, texts, strict=True):
            answers[i] = str(text)
    return answers


def _batches(model: Any, lengths: Sequence[int], batch_size: int) -> Generator[list[int]]:
    """Yield the positions of rows, batch by batch, while the model is in evaluation mode."""
    from tqdm import tqdm

    from weightlora.selection.progress import Progress

    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # the largest first: out of memory at once or never
    training = model.training
    model.eval()
    try:
        with tqdm(total=len(order), desc="answers", disable=None) as bar:
            shown = Progress(bar, "answers")
            for start in range(0, len(order), batch_size):
                some = order[start : start + batch_size]
                yield some
                shown.update(len(some))
    finally:
        model.train(training)


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's, which training uses, and the base model's own."""
    known: Any = model.generation_config.eos_token_id
    own: Any = tokenizer.eos_token_id
    return sorted({own, *(known if isinstance(known, list) else [known])} - {None})


# -- given answers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answered:
    """What the model says to the answers of a split."""

    loss: float
    """Mean −log p over all tokens of all answers, in nats."""
    exact_match: float
    """Share of rows whose answer would be written by greedy decoding, in [0, 1]."""


def answered(
    model: Any, ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], *, ends: Sequence[int], batch_size: int
) -> Answered:
    """Return loss and exact match of the answers.

    Args:
        model: A language model, with or without adapters; its mode is kept.
        ids: The tokens of each row: a prompt, and the answer with its end.
        labels: The same tokens where they belong to the answer, else -100.
        ends: Tokens that end an answer; what comes after the first one is no part of the exact match.
        batch_size: Rows a batch. Rows are sorted by length and padded on the right.
    """
    import torch
    from torch.nn import functional as F

    losses = torch.zeros((), dtype=torch.float64)
    right = tokens = 0
    for some in _batches(model, list(map(len, ids)), batch_size):
        width = len(ids[some[0]])
        tokens_in = torch.tensor([[*ids[i], *[0] * (width - len(ids[i]))] for i in some], device=model.device)
        attended = torch.tensor([[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in some])
        answer = torch.tensor([[*labels[i], *[_NO_LABEL] * (width - len(labels[i]))] for i in some]) != _NO_LABEL
        first = int(answer.any(0).int().argmax())
        with torch.no_grad():
            found = model(
                input_ids=tokens_in,
                attention_mask=attended.to(model.device),
                # From the token before the first answer. Given a count, transformers takes a slice, for which torch
                # 2.13 copies the output head's weight once a row: three times the time on a CPU.
                logits_to_keep=torch.arange(first - 1, width, device=model.device),
                use_cache=False,
            )
        logits = found.logits[:, :-1]
        wanted, counted = tokens_in[:, first:].cpu(), answer[:, first:]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens_in[:, first:].flatten(), reduction="none")
        losses += loss.cpu().view_as(counted)[counted].double().sum()
        tokens += int(counted.sum())
        judged = counted & ~_after_end(wanted, counted, ends)
        right += int(((logits.argmax(-1).cpu() == wanted) | ~judged).all(1).sum())
    return Answered(float(losses) / tokens, right / len(ids))


def _after_end(tokens: Tensor, answer: Tensor, ends: Sequence[int]) -> Tensor:
    """Whether an end token of the answer came before."""
    import torch

    ended = (torch.isin(tokens, torch.tensor(ends)) & answer).int()
    return ended.cumsum(1) - ended > 0


# -- lm-evaluation-harness --------------------------------------------------------------------------------------------


@contextmanager
def _same_random() -> Generator[None]:
    """Restore Python's random state: the harness draws names that it does not use."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


@_same_random()
def judge_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = 0,
) -> dict[str, float]:
    """Return the harness's metrics of a model, named ``task_metric``.

    Args:
        model: A language model, with or without adapters; it may be quantised, on any device.
        tokenizer: Its tokenizer.
        tasks: Names of the harness's tasks, or of those in the files of ``include_path``.
        include_path: A folder of task files in the harness's format; they take precedence.
        limit: Rows of each task; None takes all.
        batch_size: Rows a batch.
        num_fewshot: Worked rows in each prompt. 0 is how adapters are trained here; None is what the task's file says.

    Raises:
        DataError: There is no such task, or its rows cannot be loaded.
    """
    found, training = find_tasks(tasks, include_path), model.training
    from lm_eval.models.huggingface import HFLM

    make: Any = HFLM  # its registry's decorator drops the types
    try:
        lm = make(model, tokenizer=tokenizer, batch_size=batch_size, chat_template_args=template_options())
        return _scores(lm, found, limit=limit, num_fewshot=num_fewshot)
    finally:
        model.train(training)


def find_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> tuple[TaskManager, list[HarnessTask]]:
    """Return the harness's tasks of those names, with their rows loaded, and the manager that found them.

    Raises:
        DataError: There is no such task or folder, or a task's rows cannot be loaded.
        MissingPackageError: The harness is not installed.
    """
    require_extra("lm_eval", "llm")
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise DataError(f"include_path={str(include_path)!r} is no folder of lm-evaluation-harness task files")
    # Reading the harness's own 14,000 tasks takes seconds: done only if the user's files do not have them all.
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=include_path)
    found: list[Any] = []
    for name in tasks:
        try:
            loaded = manager.load([name])
        except Exception as error:  # whatever the readers of its file and of its rows raise
            said = (str(error).splitlines() or [repr(error)])[0]
            raise DataError(
                f"lm-evaluation-harness cannot load the task {name!r}: {said}; "
                "its tasks load their rows from the hub; include_path names a folder of your own task files"
            ) from error
        groups = loaded.get("groups", {})
        found += [groups[name]] if name in groups else loaded["tasks"].values()
    return manager, found


def _scores(
    lm: Any, found: tuple[TaskManager, list[HarnessTask]], *, limit: int | None, num_fewshot: int | None
) -> dict[str, float]:
    import lm_eval

    evaluate: Any = lm_eval.simple_evaluate  # its decorator drops the types
    manager, tasks = found
    results = evaluate(
        lm,
        tasks=tasks,
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=bool(lm.tokenizer.chat_template),  # as in training
        log_samples=False,
        bootstrap_iters=0,
        # No result depends on a random number, and seeding would change the caller's random state.
        **dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed")),
    )
    if results is None:  # in a distributed run only the first process has them
        return {}
    numbers: dict[str, float] = {}
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, comma, chosen = key.partition(",")  # such as "exact_match,strict-match"
            if comma and not metric.endswith("_stderr"):
                name = metric if chosen == "none" else f"{metric}_{chosen.replace('-', '_')}"
                numbers[f"{task}_{name}"] = float(value)
    return numbers
