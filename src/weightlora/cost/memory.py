"""Memory of a training step on one device, for models and batches that do not fit here; the largest batch that fits.

Weights, gradients and optimizer are sums over parameters. Everything else is counted: the step runs on the meta device
(``_allocations.py``). The peak is the most that is there at one moment, or during the optimizer's step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from weightlora.cost._allocations import PARTS, Allocations, Known, Part, record_step
from weightlora.cost._kernels import Device, checkpoint
from weightlora.cost._optimizers import OPTIMIZERS, OptimizerBytes, optimizer_bytes
from weightlora.cost.estimate import MakeLoss
from weightlora.cost.quantised import quantisation_tensors
from weightlora.errors import OptionError, SelectionError
from weightlora.model.sites import Site
from weightlora.model.torch_private import storage_id
from weightlora.text import closest

#: CUDA's allocator gives multiples of this.
_GRAIN = {"cpu": 1, "cuda": 512}
#: The largest batch that is looked for.
MOST_ROWS = 10**7


@dataclass(frozen=True)
class Setting:
    """How a model is trained."""

    rows: int
    """Rows of the batch of one device."""
    optim: str = "adamw_torch"
    """A name of :data:`OPTIMIZERS`."""
    gradient_checkpointing: bool = False
    shards: int = 1
    """Devices that share weights, gradients and optimizer (FSDP)."""
    device: Device = "cuda"
    """Whose kernels are imitated."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. The parts are the most of each; they are not all there at the same time."""

    trained: int
    """Trained parameters of the whole model: a number, not bytes."""
    weights: int
    """All parameters and buffers, with the numbers that belong to quantised ones; under FSDP the gathered ones too."""
    gradients: int
    optimizer: int
    saved: int
    """What the forward pass below the output head keeps for the backward pass."""
    logits: int
    """Logits, loss and their gradients, with what computing them takes for a moment."""
    peak: int
    """The most at one moment."""


@dataclass(frozen=True)
class StepBytes:
    """What a step takes, for any number of rows; :func:`count_step` makes it."""

    trained: int
    rows: int
    """Rows of the batch that was counted."""
    weights: int
    gathered: int
    """Weights and gradients of a block that FSDP gathers, on top of the shards."""
    optimizer: OptimizerBytes
    shards: int
    grain: int
    allocations: Allocations
    growth: tuple[int, ...] | None
    """Bytes of each storage for each further row; None where only one batch was counted."""

    def memory(self, rows: int | None = None) -> Memory:
        """The memory for a batch of ``rows`` rows; None is the batch that was counted.

        Raises:
            OptionError: Only one batch was counted.
        """
        sizes = self._sizes(self.rows if rows is None else rows)
        index = torch.tensor(self.allocations.events)
        made = index >= 0
        index = torch.where(made, index, -index - 1)
        changes = torch.where(made, sizes[index], -sizes[index])
        codes = torch.tensor([PARTS.index(part) for part in self.allocations.parts])[index]

        def most(part: Part) -> int:
            return int((changes * (codes == PARTS.index(part))).cumsum(0).max())

        always = self.weights // self.shards + self.gathered
        state, working = (n // self.shards for n in (self.optimizer.state, self.optimizer.working))
        gradients = most("gradients")
        step = max(int(changes.cumsum(0).max()), gradients + working)
        return Memory(self.trained, always, gradients, state, most("saved"), most("logits"), peak=always + state + step)

    def largest_batch(self, limit: int) -> int:
        """The most rows whose peak is at most ``limit`` bytes; 0 where not even one row fits.

        Raises:
            OptionError: Only one batch was counted.
        """
        low, high = 0, 1
        while high < MOST_ROWS and self.memory(high).peak <= limit:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            if self.memory(middle).peak <= limit:
                low = middle
            else:
                high = middle
        return low

    def _sizes(self, rows: int) -> Tensor:
        sizes = torch.tensor(self.allocations.sizes)
        if rows != self.rows:
            if self.growth is None:
                raise OptionError("only one batch was counted; give count_step(..., any_rows=True)")
            sizes = sizes + (rows - self.rows) * torch.tensor(self.growth)
        gradients = torch.tensor([part == "gradients" for part in self.allocations.parts])
        sizes = torch.where(gradients, sizes // self.shards, sizes)
        return (sizes + self.grain - 1) // self.grain * self.grain


def count_step(
    model: nn.Module, make_loss: MakeLoss, setting: Setting, *, any_rows: bool = False, known: Known | None = None
) -> StepBytes:
    """Return what a training step of ``model`` takes; nothing is computed.

    Args:
        model: On the meta device, with its adapters. Where ``setting`` says so, gradient checkpointing is switched on.
        make_loss: Makes a batch of so many rows and returns its loss.
        setting: How the model is trained.
        any_rows: Count a second batch, which has one row more, so that the memory of any batch is known. The bytes of
            each storage are a fixed number and a number for each row.
        known: See :data:`Known`; one for several similar models saves time.

    Raises:
        OptionError: The optimizer is unknown, or the model has no gradient checkpointing.
        SelectionError: The model's operations depend on numbers that only weights and a real batch have.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8, device="meta"), nn.ReLU(), nn.Linear(8, 1, device="meta"))
        >>> loss = lambda model, rows: model(torch.empty(rows, 4, device="meta")).sum()
        >>> step = count_step(net, loss, Setting(rows=500, device="cpu"), any_rows=True)
        >>> step.memory().weights == step.memory().gradients == 4 * 49
        True
        >>> step.largest_batch(step.memory().peak), step.largest_batch(step.memory().peak - 1)
        (500, 499)
    """
    if setting.optim not in OPTIMIZERS:
        names = ", ".join(OPTIMIZERS)
        raise OptionError(f"optim={setting.optim!r} is unknown{closest(setting.optim, OPTIMIZERS)}; there are {names}")
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    is_transformer = isinstance(base, PreTrainedModel)
    if setting.gradient_checkpointing:
        if not is_transformer or not base.supports_gradient_checkpointing:
            raise OptionError(f"{type(base).__name__} has no gradient checkpointing; leave it out")
        checkpoint(base, setting.device)
    head = base.get_output_embeddings() if is_transformer else None
    model.train()
    weights, gathered = sum(_sizes_by_block(model).values()), _gathered(model) if setting.shards > 1 else 0
    all_rows = (setting.rows, setting.rows + 1) if any_rows else (setting.rows,)
    try:
        counted, *more = (
            record_step(model, partial(make_loss, model, rows), head, setting.device, known) for rows in all_rows
        )
    except (
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # by the model
        reason = " ".join(str(error).split())[:200]
        raise SelectionError(f"{type(base).__name__} does not run without numbers: {reason}") from error
    growth = _growth(counted, more[0]) if more else None
    trained = [p for p in model.parameters() if p.requires_grad]
    return StepBytes(
        sum(p.numel() for p in trained),
        setting.rows,
        weights,
        gathered,
        optimizer_bytes(setting.optim, trained, setting.device),
        setting.shards,
        _GRAIN[setting.device],
        counted,
        growth,
    )


def _growth(one: Allocations, other: Allocations) -> tuple[int, ...]:
    """Bytes of each storage for a further row."""
    if (one.parts, one.events) != (other.parts, other.events):
        raise OptionError("this model's operations depend on the number of rows; the largest batch cannot be told")
    return tuple(more - size for size, more in zip(one.sizes, other.sizes, strict=True))


def _sizes_by_block(model: nn.Module, *, trained: bool = False) -> dict[str, int]:
    """Bytes of parameters and buffers by repeated layer, each storage once; what is outside of all layers is in "".

    Args:
        model: The model.
        trained: Only trained parameters.
    """
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if trained and not tensor.requires_grad:
            continue
        for part in (tensor, *quantisation_tensors(tensor)):
            if storage_id(part) not in seen:
                seen.add(storage_id(part))
                block = Site(name, 0, 0).block
                sizes[block] = sizes.get(block, 0) + part.untyped_storage().nbytes()
    return sizes


def _gathered(model: nn.Module) -> int:
    """What FSDP gathers: all outside of the layers, the layer at work and the next one, and their gradients."""
    weights, gradients = _sizes_by_block(model), _sizes_by_block(model, trained=True)
    outside = weights.pop("", 0) + gradients.pop("", 0)
    return outside + 2 * max(weights.values(), default=0) + max(gradients.values(), default=0)
