"""A training whose first steps a method takes before the trainer: with its optimizer, and into its first checkpoint."""

from __future__ import annotations

from copy import copy
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import Trainer, TrainerState
from transformers.optimization import GreedyLR
from transformers.trainer_callback import ExportableState

from weightlora.errors import OptionError
from weightlora.plan.plan import AdapterPlan
from weightlora.selection.stage import MakeStep, OptimizerStep
from weightlora.selection.trained import Begun
from weightlora.trainer.guard import PlanSaver
from weightlora.trainer.loader import is_parted, planned_steps


def run_step(trainer: Trainer) -> MakeStep:
    """Return what makes the trainer's own optimizer and schedule for another model than its present one."""
    steps = planned_steps(trainer)

    def make(model: nn.Module) -> OptimizerStep:
        own = _optimizing(trainer, model, steps)
        by_metric = isinstance(own.lr_scheduler, ReduceLROnPlateau | GreedyLR)  # they act after evaluations
        scheduler: Any = None if by_metric else own.lr_scheduler
        return OptimizerStep(model, own.optimizer, scheduler, float(trainer.args.max_grad_norm or 0))

    return make


def write_checkpoint(trainer: Trainer, begun: Begun, plan: AdapterPlan) -> None:
    """Write the checkpoint from which ``trainer.train(resume_from_checkpoint=True)`` goes on after ``begun.steps``."""
    model: Any = trainer.model
    steps = planned_steps(trainer)
    own = _optimizing(trainer, model, steps)
    for name, parameter in model.named_parameters():
        if name in begun.optimizer:
            own.optimizer.state[parameter] = {**begun.optimizer[name]}
    if begun.scheduler:
        own.lr_scheduler.load_state_dict({**begun.scheduler})
        for group, rate in zip(own.optimizer.param_groups, own.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
    own.args = copy(trainer.args)
    # The training cannot go on without all of it, whatever the later checkpoints hold.
    own.args.save_only_model, own.args.push_to_hub, own.args.save_total_limit = False, False, None
    exported = [each for each in (*own.callback_handler.callbacks, own.control) if isinstance(each, ExportableState)]
    own.state = TrainerState(
        global_step=begun.steps,
        max_steps=steps,
        train_batch_size=trainer.args.train_batch_size,
        stateful_callbacks=exported,  # pyright: ignore[reportArgumentType]  # as the Trainer makes it
    )
    own.state.compute_steps(own.args, steps)
    own._save_checkpoint(model, trial=None)  # the only writer of all that train() reads
    PlanSaver(plan).on_save(own.args, own.state, own.control, model=model)


def require_whole(trainer: Trainer, name: str) -> None:
    """Raise where the trainer's optimizer cannot take steps before the training.

    Args:
        trainer: A fresh trainer.
        name: Of the method, for the error.

    Raises:
        OptionError: It is parted over processes, or scales its gradients.
    """
    if is_parted(trainer):
        raise OptionError(
            f"{name} takes the first steps of the training before it, and FSDP, DeepSpeed and tensor parallelism part "
            "the optimizer that goes on; select with method selected and rule='paper', or run it in one process or "
            "under DDP"
        )
    if trainer.accelerator.scaler is not None:
        raise OptionError(f"{name} takes the first steps of the training without fp16's scaling; give bf16=True")


def _optimizing(trainer: Trainer, model: nn.Module, steps: int) -> Any:
    """A copy of the trainer with an optimizer and a schedule for ``model``."""
    own: Any = copy(trainer)
    own.model, own.optimizer, own.lr_scheduler = model, None, None
    own.create_optimizer()
    own.create_scheduler(steps)
    return own
