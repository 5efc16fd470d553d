"""Scores of language models by lm-evaluation-harness, on its own tasks or on local task files."""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.errors import DataError, require_extra
from weightlora.tasks._prompts import template_options

if TYPE_CHECKING:
    from lm_eval.api.task import Task as HarnessTask
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerBase


@contextmanager
def _same_random() -> Generator[None]:
    """Restore Python's random state: the harness draws names that it does not use."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


@_same_random()
def judge(
    base_path: str | Path,
    adapter: str | Path | None,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = 0,
) -> dict[str, float]:
    """Return the harness's metrics of a saved adapter on its base model, named ``task_metric``.

    Args:
        base_path: Folder or hub name of the base model, or its ``.gguf`` file.
        adapter: Folder of the adapter; None evaluates the base model.
        tasks: Names of the harness's tasks, or of those in the files of ``include_path``.
        include_path: A folder of task files in the harness's format; they take precedence.
        limit: Rows of each task; None takes all.
        batch_size: Rows a batch.
        num_fewshot: Worked rows in each prompt. 0 is how adapters are trained here; None is what the task's file says.

    Raises:
        DataError: There is no such model, adapter or task, or its rows cannot be loaded.
    """
    import torch

    base = Path(base_path)
    gguf = base.suffix == ".gguf"
    try:
        lm = _harness_model(
            str(base.parent if gguf else base_path),
            gguf_file=base.name if gguf else None,
            peft=None if adapter is None else str(adapter),
            device="cuda" if torch.cuda.is_available() else "cpu",
            batch_size=batch_size,
            chat_template_args=template_options(),
        )
    except (OSError, ValueError) as error:
        what = base_path if adapter is None else f"{base_path} with the adapter {adapter}"
        raise DataError(f"cannot load {what}: {str(error).splitlines()[0]}") from error
    return _scores(lm, find_tasks(tasks, include_path), limit=limit, num_fewshot=num_fewshot)


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
    """Return the harness's metrics of a model in memory, as :func:`judge` does; it may be quantised, on any device.

    Raises:
        DataError: There is no such task, or its rows cannot be loaded.
    """
    found, training = find_tasks(tasks, include_path), model.training
    try:
        lm = _harness_model(model, tokenizer=tokenizer, batch_size=batch_size, chat_template_args=template_options())
        return _scores(lm, found, limit=limit, num_fewshot=num_fewshot)
    finally:
        model.train(training)


def _harness_model(*arguments: Any, **named: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    make: Any = HFLM  # its registry's decorator drops the types
    return make(*arguments, **named)


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
