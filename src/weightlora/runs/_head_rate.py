"""A learning rate of its own for what is trained whole: a new head starts at random, adapters at a trained model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightlora.errors import OptionError
from weightlora.model.sites import TASK_HEADS
from weightlora.tasks import find_task, kind_of

if TYPE_CHECKING:
    from transformers import Trainer

    from weightlora.runs.recipe import Recipe


def require_head(recipe: Recipe) -> None:
    """Raise where ``head_learning_rate`` has nothing to act on.

    Raises:
        OptionError: The task has no new head, and no module is trained whole.
    """
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
