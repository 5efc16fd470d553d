"""What a training is asked for: arguments that it would refuse late, a rate for the head, and whether the loss fell."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Collection, Sequence
from copy import copy
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlora.errors import MissingPackageError, OptionError
from weightlora.model.restore import seeded
from weightlora.model.sites import TASK_HEADS
from weightlora.tasks import find_task, kind_of
from weightlora.text import closest
from weightlora.trainer.loader import planned_steps

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

    from weightlora.runs.recipe import Recipe

#: What the task decides, since it computes the metrics from the logits of all rows and their labels.
_OF_THE_TASK = ("label_names", "eval_do_concat_batches", "batch_eval_metrics", "prediction_loss_only")
#: Fewer logged losses than this say nothing.
_FEWEST = 10
#: What transformers measures beside the loss.
_TIMES = ("runtime", "samples_per_second", "steps_per_second")


def check_arguments(arguments: TrainingArguments) -> None:
    """Raise where training arguments cannot be followed on this machine; before anything is loaded.

    Raises:
        MissingPackageError: A tracker or a kernel is not installed.
        OptionError: With the argument and what to change.
    """
    _require_trackers(arguments.report_to or ())
    _require_compiled(arguments)
    for field in dataclasses.fields(arguments):
        if field.name in _OF_THE_TASK and getattr(arguments, field.name) != field.default:
            raise OptionError(f"{field.name} is decided by the task, which measures its metrics; leave it out")
    if arguments.fp16 and arguments.device.type == "cpu":  # accelerate would train in float32 without a word
        raise OptionError("fp16=True needs an accelerator, and this run is on a CPU; leave it out, or give bf16")
    if arguments.dataloader_persistent_workers and not arguments.dataloader_num_workers:
        raise OptionError("dataloader_persistent_workers needs dataloader_num_workers of at least 1; give both")
    if arguments.fsdp and arguments.parallel_mode.value != "distributed":
        raise OptionError(
            "fsdp shards a model over several processes, and this is one; start it with torchrun, or leave it out"
        )
    asked = arguments.resume_from_checkpoint
    if asked is not None and asked.lower() != "true" and not Path(asked).is_dir():
        raise OptionError(f"resume_from_checkpoint={asked!r} is no folder; give a checkpoint, or leave it out")


def require_trainable(trainer: Trainer, metrics: Sequence[str]) -> None:
    """Raise where the trainer would fail once it trains, or would not do what its arguments say.

    Args:
        trainer: A fresh trainer; it is left as it is.
        metrics: What the task measures.

    Raises:
        MissingPackageError: The optimizer's package is not installed.
        OptionError: With the argument and what to change.
    """
    arguments = trainer.args
    with seeded(0):  # the training's own loader must not depend on this one
        batches: int = len(trainer.get_train_dataloader())
        if not batches:
            raise OptionError(
                f"per_device_train_batch_size={arguments.per_device_train_batch_size} leaves no whole batch of the "
                "training rows; lower it, or leave dataloader_drop_last out"
            )
        if arguments.gradient_accumulation_steps > batches:
            raise OptionError(
                f"gradient_accumulation_steps={arguments.gradient_accumulation_steps} is more than the {batches} "
                "batches of an epoch; lower it"
            )
        steps = planned_steps(trainer)
        if arguments.get_warmup_steps(steps) > steps:
            raise OptionError(
                f"warmup_steps={arguments.warmup_steps} is more than the {steps} steps of the training, so that "
                "learning_rate is never reached; lower it, or give a share of the steps"
            )
        if not trainer.is_deepspeed_enabled:  # which has its own
            _require_optimizer(trainer, steps)
    if arguments.eval_strategy != "no" and arguments.metric_for_best_model is not None:
        _require_metric(arguments.metric_for_best_model, _measured(trainer, metrics))


def _require_trackers(names: Collection[str]) -> None:
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    installed = get_available_reporting_integrations()
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise OptionError(f"report_to={name!r} is unknown{closest(name, INTEGRATION_TO_CALLBACK)}")
        if name not in installed:
            raise MissingPackageError(f"report_to={name}: its package is not installed; install it, or give none")


def _require_compiled(arguments: TrainingArguments) -> None:
    import torch
    from transformers.utils import is_liger_kernel_available

    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise MissingPackageError("use_liger_kernel: liger-kernel is not installed; run: pip install liger-kernel")
    if arguments.torch_compile:
        backend, mode = arguments.torch_compile_backend or "inductor", arguments.torch_compile_mode
        try:
            torch.compile(torch.nn.Identity(), backend=backend, mode=mode)
        except RuntimeError as error:
            raise OptionError(f"torch_compile_mode={mode!r}, torch_compile_backend={backend!r}: {error}") from error


def _require_optimizer(trainer: Trainer, steps: int) -> None:
    """Raise where the trainer cannot make its optimizer or its scheduler; what a copy of it makes is dropped."""
    trial = copy(trainer)
    makes: dict[tuple[str, str], Callable[[], Any]] = {
        ("optim", "optim_args"): trial.create_optimizer,
        ("lr_scheduler_type", "lr_scheduler_kwargs"): lambda: trial.create_scheduler(steps),
    }
    for names, make in makes.items():
        given = {name: getattr(trainer.args, name) for name in names}
        told = ", ".join(f"{k}={v.value if isinstance(v, Enum) else v}" for k, v in given.items() if v is not None)
        try:
            make()
        except ImportError as error:
            raise MissingPackageError(f"{told}: {_one_line(error)}") from error
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise OptionError(f"{told} cannot be used: {_one_line(error)}") from error


def _measured(trainer: Trainer, metrics: Sequence[str]) -> list[str]:
    """The names of what the trainer measures while it trains."""
    names = ["loss", *(metrics if trainer.compute_metrics is not None else ()), *_TIMES]
    splits: Any = trainer.eval_dataset
    return [f"{split}_{name}" for split in splits for name in names] if isinstance(splits, dict) else names


def _require_metric(name: str, known: Sequence[str]) -> None:
    if name.removeprefix("eval_") not in known:
        told = [one for one in known if not one.endswith(_TIMES)]
        raise OptionError(
            f"metric_for_best_model={name!r} is not measured in the training{closest(name, known)}; give one of "
            f"{', '.join(told)}"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# -- a rate for the head -----------------------------------------------------------------------------------------------


def require_head(recipe: Recipe) -> None:
    """Raise where ``head_learning_rate`` has nothing to act on.

    Raises:
        OptionError: The task has no new head and no module is trained whole, or all are, by full fine-tuning.
    """
    if recipe.method.method == "full":
        raise OptionError("head_learning_rate is for adapters beside a head, and full trains all weights; leave it out")
    task = recipe.task.task
    if not (TASK_HEADS.get(kind_of(find_task(task)).TASK_TYPE) or recipe.method.lora_modules_to_save):
        raise OptionError(
            f"head_learning_rate={recipe.method.head_learning_rate}: {task} has no new head; leave it out, or give "
            "modules that are trained whole in lora_modules_to_save"
        )


def require_one_piece(trainer: Trainer) -> None:
    """Raise where an optimizer that is made now would not be the one that trains.

    Raises:
        OptionError: DeepSpeed or FSDP splits the model first.
    """
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise OptionError(
            "head_learning_rate is not supported with DeepSpeed and FSDP, which split the model before there is an "
            "optimizer; leave it out"
        )


def use_head_rate(trainer: Trainer, rate: float) -> None:
    """Make the trainer's optimizer, with another learning rate for the parameters of what is trained whole.

    The schedule of the training scales both rates.

    Args:
        trainer: With its adapters attached, before it trains.
        rate: Of the head; the adapters keep ``learning_rate``.
    """
    model: Any = trainer.model
    head = {id(p) for name, p in model.named_parameters() if p.requires_grad and ".modules_to_save." in name}
    optimizer = trainer.create_optimizer()
    for group in list(optimizer.param_groups):
        whole = [p for p in group["params"] if id(p) in head]
        if whole:
            group["params"] = [p for p in group["params"] if id(p) not in head]
            optimizer.add_param_group({**group, "params": whole, "lr": rate})


# -- the loss ----------------------------------------------------------------------------------------------------------


def loss_fault(losses: Sequence[float], rate: float) -> str | None:
    """Return what to tell the user of a loss that has not fallen; None where it has, or where few losses are logged.

    The loss has fallen where the mean of the last fifth is below that of the first fifth by more than the median change
    from one logged loss to the next.

    Args:
        losses: As logged; one that is no finite number stands for a step that failed.
        rate: The learning rate, for the text.

    Example:
        >>> loss_fault([1.4, 1.3, 1.2, 1.1, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5], 1e-3)
        >>> loss_fault([1.4] * 10, 5e-5)[:73]
        'the loss has not fallen: 1.4 in the first fifth of the training, 1.4 in t'
    """
    if len(losses) < _FEWEST:
        return None
    if not all(map(math.isfinite, losses)):
        return f"the loss was no finite number in the training (learning_rate={rate:g}); try a lower learning_rate"
    fifth = len(losses) // 5
    first, last = statistics.mean(losses[:fifth]), statistics.mean(losses[-fifth:])
    spread = statistics.median(abs(a - b) for a, b in pairwise(losses))
    if first - last > spread:
        return None
    advice = "a lower" if last - first > spread else "a higher"
    return (
        f"the loss has not fallen: {first:.4g} in the first fifth of the training, {last:.4g} in the last, with "
        f"changes of {spread:.2g} from one logged loss to the next (learning_rate={rate:g}); try {advice} "
        "learning_rate or more steps, and look at the rows and their labels"
    )
