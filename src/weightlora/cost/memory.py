"""Memory of a training step on one device, for models and batches that do not fit here; the largest batch that fits.

Weights, gradients and optimizer are sums over parameters. Everything else is counted: the step runs on the meta device
(``_allocations.py``). The peak is the most that is there at one moment, or during the optimizer's step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from weightlora.cost._allocations import PARTS, Allocations, Device, Known, Part, checkpoint, record_step
from weightlora.cost.empty_model import quantisation_tensors
from weightlora.errors import OptionError, SelectionError
from weightlora.model.modules import base_of
from weightlora.model.sites import block_of
from weightlora.model.torch_private import storage_id
from weightlora.text import closest

MakeLoss = Callable[[nn.Module, int], Tensor]
"""``make_loss(model, rows)`` makes a batch of so many rows and returns its loss."""
#: CUDA's allocator gives multiples of this.
_GRAIN = {"cpu": 1, "cuda": 512}
#: The largest batch that is looked for.
MOST_ROWS = 10**7


#: bitsandbytes keeps smaller parameters in 32 bits, and a scale for each block of the others.
_LEAST_8BIT, _BLOCK_8BIT = 4096, 256
#: The two tables of 256 levels that all parameters share.
_LEVELS_8BIT = 2 * 256 * 4
#: A counter of steps in float32, for each parameter.
_COUNTER = 4


@dataclass(frozen=True)
class OptimizerBytes:
    """What an optimizer takes for a set of trained parameters."""

    state: int
    """Kept between steps."""
    working: int
    """The most that a step makes and frees again."""


def optimizer_bytes(name: str, trained: Sequence[Tensor], device: Device) -> OptimizerBytes:
    """Return the bytes of the optimizer that the Trainer makes for ``--optim name``.

    Args:
        name: One of :data:`OPTIMIZERS`.
        trained: The trained parameters.
        device: torch steps all parameters at once on a GPU, and one after the other on a CPU.

    Example:
        >>> import torch
        >>> optimizer_bytes("adamw_torch", [torch.empty(10, 10), torch.empty(10)], "cpu")
        OptimizerBytes(state=888, working=800)
        >>> optimizer_bytes("adamw_torch_fused", [torch.empty(10, 10), torch.empty(10)], "cuda")
        OptimizerBytes(state=888, working=0)
    """
    return OPTIMIZERS[name](trained, device)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _adamw(trained: Sequence[Tensor], device: Device) -> OptimizerBytes:
    """The root of the second moment, then its quotient: of all at once in place, or of one and then in another."""
    sizes = [_bytes(p) for p in trained]
    working = sum(sizes) if device == "cuda" else 2 * max(sizes, default=0)
    return OptimizerBytes(2 * sum(sizes) + _COUNTER * len(sizes), working)


def _adamw_fused(trained: Sequence[Tensor], device: Device) -> OptimizerBytes:
    return OptimizerBytes(_adamw(trained, device).state, 0)


def _adamw_8bit(trained: Sequence[Tensor], _device: Device) -> OptimizerBytes:
    state = _LEVELS_8BIT
    for n in (p.numel() for p in trained):
        state += 2 * (n + 4 * -(-n // _BLOCK_8BIT)) if n >= _LEAST_8BIT else 2 * 4 * n
    return OptimizerBytes(state, 0)


def _adafactor(trained: Sequence[Tensor], _device: Device) -> OptimizerBytes:
    """Transformers' Adafactor without a first moment; a matrix has a number for each row and for each column."""
    state, working = 0, 0
    for p in trained:
        shape = tuple(p.shape)
        numbers = prod(shape[:-1]) + prod((*shape[:-2], shape[-1])) if len(shape) > 1 else prod(shape)
        state += numbers * p.element_size()
        copies = 2 if p.element_size() == 4 else 4  # of the gradient and of the parameter, in float32
        working = max(working, 4 * copies * p.numel())
    return OptimizerBytes(state, working)


def _sgd(_trained: Sequence[Tensor], _device: Device) -> OptimizerBytes:
    return OptimizerBytes(0, 0)


#: By the names of transformers' ``--optim``.
OPTIMIZERS: Mapping[str, Callable[[Sequence[Tensor], Device], OptimizerBytes]] = {
    "adamw_torch": _adamw,
    "adamw_torch_fused": _adamw_fused,
    "adamw_8bit": _adamw_8bit,
    "adafactor": _adafactor,
    "sgd": _sgd,
}


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
    base: Any = base_of(model)
    is_transformer = isinstance(base, PreTrainedModel)
    if setting.gradient_checkpointing:
        if not is_transformer or not base.supports_gradient_checkpointing:
            raise OptionError(f"{type(base).__name__} has no gradient checkpointing; leave it out")
        checkpoint(base, setting.device)
    head = base.get_output_embeddings() if is_transformer else None
    model.train()
    weights, gathered = weight_bytes(model), _gathered(model) if setting.shards > 1 else 0
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


def byte_grain(device: Device) -> int:
    """Bytes of which the allocator gives multiples."""
    return _GRAIN[device]


def _growth(one: Allocations, other: Allocations) -> tuple[int, ...]:
    """Bytes of each storage for a further row."""
    if (one.parts, one.events) != (other.parts, other.events):
        raise OptionError("this model's operations depend on the number of rows; the largest batch cannot be told")
    return tuple(more - size for size, more in zip(one.sizes, other.sizes, strict=True))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, with the scales and levels of quantised ones; each storage once."""
    return sum(_sizes_by_block(model).values())


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
                block = block_of(name)
                sizes[block] = sizes.get(block, 0) + part.untyped_storage().nbytes()
    return sizes


def _gathered(model: nn.Module) -> int:
    """What FSDP gathers: all outside of the layers, the layer at work and the next one, and their gradients."""
    weights, gradients = _sizes_by_block(model), _sizes_by_block(model, trained=True)
    outside = weights.pop("", 0) + gradients.pop("", 0)
    return outside + 2 * max(weights.values(), default=0) + max(gradients.values(), default=0)
