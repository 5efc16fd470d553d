"""What a trainer is going to train on, looked at before it does: its own batches and loss, outside its logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy, deepcopy
from typing import Any

from torch import Tensor, nn
from transformers import Trainer


def planned_steps(trainer: Trainer) -> int:
    """Return how many optimizer steps ``trainer.train()`` is going to take."""
    *_, max_steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    return int(max_steps)


def quiet_copy(trainer: Trainer) -> Trainer:
    """Return a copy of the trainer with notebooks of its own: what a loss writes down stays out of the logs."""
    quiet = copy(trainer)
    notes = {
        key: value for key, value in vars(trainer).items() if isinstance(value, dict) and key != "callback_handler"
    }
    vars(quiet).update(deepcopy(notes))
    return quiet


def optimizer_steps(trainer: Trainer) -> Iterator[tuple[list[Any], Any]]:
    """Yield the training's own batches, grouped by optimizer step, each with its count of items for the mean."""
    batches = iter(trainer.get_train_dataloader())
    while True:
        group, items = trainer.get_batch_samples(batches, trainer.args.gradient_accumulation_steps, trainer.args.device)
        if not group:
            return
        yield group, items


def losses(trainer: Trainer) -> Callable[[nn.Module, tuple[list[Any], Any]], Iterator[Tensor]]:
    """Return the trainer's loss of each micro-batch, scaled so that their gradients add up to that of the step."""

    def of_step(model: nn.Module, step: tuple[list[Any], Any]) -> Iterator[Tensor]:
        group, items = step
        scaled = trainer.loss_is_scaled_for_ga
        if scaled is None:
            scaled = (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None
        for inputs in group:
            with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
                # A copy: losses may write to their inputs, and a batch can be used twice.
                loss: Any = trainer.compute_loss(model, dict(inputs), num_items_in_batch=items)
            yield loss if scaled else loss / len(group)

    return of_step


def micro_batches(trainer: Trainer) -> Iterator[Any]:
    """Yield the training's own batches one by one, for methods that look at rows and not at optimizer steps."""
    for group, _ in optimizer_steps(trainer):
        yield from group


def micro_loss(trainer: Trainer) -> Callable[[nn.Module, Any], Tensor]:
    """Return the trainer's loss of one batch."""

    def loss(model: nn.Module, inputs: Any) -> Tensor:
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            return trainer.compute_loss(model, dict(inputs))  # pyright: ignore[reportReturnType]

    return loss
