"""Bytes of an optimizer: the state that it keeps, and what its step needs for a moment. Pure functions of shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from weightlora.cost._kernels import Device

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
