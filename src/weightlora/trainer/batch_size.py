"""Rows at once and accumulation for the memory that there is: a plan that keeps less may take more rows, LoRA fewer.

8 rows × 4 accumulated become 16 × 2 or 32 × 1, or 4 × 8: the optimizer's steps stay what they were.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size
from torch import Tensor
from transformers import Trainer

from weightlora.cost.estimate import plain_lora
from weightlora.cost.saved_bytes import ADAMW_COPIES, parameter_cost, saved_cost
from weightlora.errors import OptionError, WeightLoraWarning
from weightlora.fast.enable import enable_fast_lora
from weightlora.fast.step import Dropout
from weightlora.model.distributed import from_first, is_first
from weightlora.model.gathering import is_offloaded
from weightlora.model.restore import seeded, untouched
from weightlora.plan.plan import AdapterPlan
from weightlora.trainer.loader import losses, optimizer_steps, placed, quiet_copy

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """What an optimizer step is made of on each device."""

    rows: int
    """Rows at once."""
    accumulation: int
    """How many times."""

    def grown(self, factor: int) -> Batch:
        """So many times the rows, so many times less often."""
        return Batch(self.rows * factor, self.accumulation // factor)

    @property
    def candidates(self) -> list[Batch]:
        """All batches of the same step with as many rows or more, the largest first.

        Example:
            >>> Batch(8, 4).candidates
            [Batch(rows=32, accumulation=1), Batch(rows=16, accumulation=2), Batch(rows=8, accumulation=4)]
        """
        return [self.grown(k) for k in range(self.accumulation, 0, -1) if self.accumulation % k == 0]


def grown_batch(trainer: Trainer, plan: AdapterPlan, *, fast: Dropout | None = None) -> Batch:
    """Return the largest batch whose step takes no more memory than that of plain LoRA at the batch asked for.

    On a CUDA device both are run, forwards and backwards, and their peaks compared. Elsewhere the bytes saved for the
    backward pass are counted, beside trained parameters, gradients and AdamW's state; they grow with the rows. The rows
    are those of the first optimizer step in either case. The trainer and its model stay as they are.

    Args:
        trainer: It carries the plan and has not trained yet.
        plan: What its model carries.
        fast: The ``dropout`` of the fast step, where it is on; plain LoRA is then measured with it too.

    Warns:
        WeightLoraWarning: There is no accumulation to take rows from, or no larger batch fits.
    """
    asked = Batch(trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps)
    if asked.accumulation == 1:
        _warn("gradient_accumulation_steps is 1: a larger batch would be another training; accumulate more steps")
        return asked
    with placed(trainer):
        measure = _fits_on_device if trainer.args.device.type == "cuda" else _fits_by_bytes
        own = fitting(asked, measure(trainer, plan, asked, fast))
    found = from_first(lambda: own)  # each process has its own rows, and all must step alike
    if found == asked:
        _warn(f"no batch larger than {asked.rows} fits into the memory of plain LoRA; keep fewer or higher sites")
    return found


def fitting(asked: Batch, fits: Callable[[Batch], bool]) -> Batch:
    """Return the largest of ``asked.candidates`` that fits; the batch asked for always does.

    Args:
        asked: The smallest.
        fits: Whether a larger one does; a batch that it runs out of memory with does not.

    Example:
        >>> fitting(Batch(8, 12), lambda batch: batch.rows <= 40)
        Batch(rows=32, accumulation=3)
    """
    of_size = {batch.rows: batch for batch in asked.candidates}
    smaller = iter([*of_size][1:])

    def attempt(batch_size: int) -> Batch:
        batch = of_size[batch_size]
        if batch != asked and not fits(batch):
            raise torch.OutOfMemoryError("more than plain LoRA takes: out of memory.")  # what accelerate looks for
        return batch

    search: Any = find_executable_batch_size(attempt, asked.candidates[0].rows, partial(next, smaller))
    return search()


def use_batch(trainer: Trainer, batch: Batch) -> None:
    """Let the trainer step by ``batch``; its arguments are replaced, not changed, since others hold them."""
    arguments = copy(trainer.args)
    arguments.per_device_train_batch_size = batch.rows
    arguments.gradient_accumulation_steps = batch.accumulation
    trainer.args = arguments
    trainer._train_batch_size = arguments.train_batch_size  # pyright: ignore[reportPrivateUsage]  # its own copy


def split_batch(trainer: Trainer, plan: AdapterPlan) -> None:
    """Let the trainer take as many rows at once as the plan's limit on memory allows, and accumulate the others.

    Warns:
        WeightLoraWarning: The trainer's batch has no such parts, or DeepSpeed was told the batch already.
    """
    if plan.batch_parts == 1:
        return
    rows, rest = divmod(trainer.args.per_device_train_batch_size, plan.batch_parts)
    part = Batch(rows, trainer.args.gradient_accumulation_steps * plan.batch_parts)
    if rest or trainer.is_deepspeed_enabled:
        warnings.warn(
            f"per_device_train_batch_size={trainer.args.per_device_train_batch_size}: the plan fits into memory with "
            f"1/{plan.batch_parts} of these rows; set this number and gradient_accumulation_steps yourself",
            WeightLoraWarning,
            stacklevel=2,
        )
        return
    use_batch(trainer, part)
    if is_first():
        _LOG.warning(
            "the plan trains %d rows at once, with gradient_accumulation_steps=%d", part.rows, part.accumulation
        )


def require_growable(trainer: Trainer) -> None:
    """Raise where another setting decides the batch, or nothing says what it takes.

    Raises:
        OptionError: With the setting.
    """
    if trainer.is_deepspeed_enabled:
        raise OptionError("grow_batch: DeepSpeed was told the batch already; leave grow_batch out")
    model: Any = trainer.model
    if is_offloaded(model):
        raise OptionError("grow_batch: an offloaded model's memory is not that of its training; leave grow_batch out")
    if trainer.args.auto_find_batch_size:
        raise OptionError("grow_batch and auto_find_batch_size both choose the batch; leave one out")
    if trainer.args.activation_checkpointing and trainer.args.device.type != "cuda":
        raise OptionError(
            "grow_batch: bytes are not counted under gradient checkpointing, which saves the blocks' inputs alone; "
            "leave grow_batch out, or give gradient_checkpointing: false (TRL's default is true)"
        )


_Fits = Callable[[Batch], bool]


def _fits_by_bytes(trainer: Trainer, plan: AdapterPlan, asked: Batch, fast: Dropout | None) -> _Fits:
    """By the micro-batch of the first step that saves most: of k times the rows, a step saves k times the bytes."""

    def count(variant: AdapterPlan) -> tuple[int, int]:
        with _lent(trainer, variant, fast) as (model, make_losses):
            return parameter_cost(model).of_all, saved_cost(model, partial(make_losses, step)).of_all

    step = _first_step(trainer, asked)
    limit = sum(count(plain_lora(plan)))
    parameters, saved = count(plan)
    return lambda batch: parameters + saved * (batch.rows // asked.rows) <= limit


def _fits_on_device(trainer: Trainer, plan: AdapterPlan, asked: Batch, fast: Dropout | None) -> _Fits:
    """By the peaks of the first step, and AdamW's state, which is made when that is over."""
    steps = {batch: _first_step(trainer, batch) for batch in asked.candidates}  # on all processes alike

    def peak(variant: AdapterPlan, batch: Batch) -> int:
        with _lent(trainer, variant, fast) as (model, make_losses):
            torch.cuda.reset_peak_memory_stats(trainer.args.device)
            for loss in make_losses(steps[batch]):
                loss.backward()
            moments = parameter_cost(model).of_all * 2 // ADAMW_COPIES
            return torch.cuda.max_memory_allocated(trainer.args.device) + moments

    limit = peak(plain_lora(plan), asked)
    return lambda batch: peak(plan, batch) <= limit


def _first_step(trainer: Trainer, batch: Batch) -> Any:
    """The micro-batches of the first optimizer step, if it went by ``batch``."""
    quiet = quiet_copy(trainer)
    use_batch(quiet, batch)
    with seeded(trainer.args.seed):
        return next(optimizer_steps(quiet))


@contextmanager
def _lent(
    trainer: Trainer, variant: AdapterPlan, fast: Dropout | None
) -> Generator[tuple[Any, Callable[[Any], Iterable[Tensor]]]]:
    """The trainer's base model with the adapters of ``variant``, as they are trained, and its losses of a step."""
    model: Any = trainer.model
    with untouched(model, seed=trainer.args.seed), torch.enable_grad():
        # Other starts than the usual, such as PiSSA's, would write to the base.
        attached = variant.attach(model.base_model.unload(), init_lora_weights=True).train()
        if fast is not None:
            enable_fast_lora(attached, fast)
        yield attached, partial(losses(quiet_copy(trainer)), attached)


def _warn(reason: str) -> None:
    warnings.warn(f"grow_batch: {reason}", WeightLoraWarning, stacklevel=3)
