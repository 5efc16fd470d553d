"""Dropout without a number a value: what is dropped is drawn as the gaps between one dropped value and the next.

With probability p a value is dropped, independently of the others; the distance to the next dropped one is then
geometric. Drawing these distances takes p·n random numbers instead of n and keeps two bytes for each, which on a CPU
is twenty times faster than a mask at p = 0.05. Other devices draw n numbers at once and keep a byte for each.

A *mask* below is either of the two: a vector of gaps (an integer type; the first one less, so that running sums are
positions), or booleans of the values' shape, True = kept. It is small, to be held until the backward pass;
:func:`unpack` makes of it what :func:`zeroed` goes by.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from weightlora.model.torch_private import is_fake

Dropout = Literal["input", "rank"]
"""Where dropout acts: on the numbers of x, as PEFT has it, or on the r numbers a token that ``lora_A`` returns."""


def drop(values: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Return a contiguous copy of ``values`` with zeros where dropout drops them, the rest not scaled; and the mask.

    Args:
        values: A tensor of any shape.
        p: Probability of being dropped, 0 < p < 1. It is drawn from the global random numbers of the device.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> ones = torch.ones(100, 1000)
        >>> copy, mask = drop(ones, p=0.05)
        >>> round(copy.mean().item(), 2)
        0.95
        >>> zeroed(ones, unpack(mask)).equal(copy)
        True
    """
    if values.device.type != "cpu":
        mask = torch.empty_like(values, dtype=torch.bool).bernoulli_(1 - p)
        return zeroed(values, mask), mask
    n = values.numel()
    # No more are dropped than this, but for once in 10^13 masks, and then the last values are kept.
    most = math.ceil(n * p + 8 * math.sqrt(n * p * (1 - p))) + 32
    # P(gap > k) = P(v < (1−p)^k) for v uniform in (0, 1]; torch.rand is in [0, 1). v has 24 bits: it is at least 2^-24.
    rate = -math.log1p(-p)
    longest = 24 * math.log(2) / rate + 1
    gaps = torch.rand(most, dtype=torch.float32).neg_().log1p_().div_(-rate).add_(1)
    gaps = gaps.to(torch.int16 if longest < 2**15 else torch.int32)  # rounds down
    gaps[:1].sub_(1)
    dropped = unpack(gaps)
    # Where only bytes are counted (estimate.py) there are no numbers to look at: the expected count stands for them.
    inside = round(n * p) if is_fake(values) else int(torch.searchsorted(dropped, n))
    mask = gaps[:inside].clone()  # without the clone, the backward pass would hold the rest as well
    return zeroed(values, dropped[:inside]), mask


def unpack(mask: Tensor) -> Tensor:
    """Return what :func:`zeroed` and :func:`zero` go by: flat positions of the dropped values, or the booleans."""
    return mask if mask.dtype == torch.bool else mask.cumsum(0)


def zeroed(values: Tensor, unpacked: Tensor) -> Tensor:
    """Return a contiguous copy of ``values`` with zeros where they are dropped."""
    if unpacked.dtype == torch.bool:
        return values * unpacked
    copy = values.clone(memory_format=torch.contiguous_format)
    zero(copy, unpacked)
    return copy


def zero(values: Tensor, unpacked: Tensor) -> None:
    """Write zeros into the contiguous ``values`` where they are dropped."""
    if unpacked.dtype == torch.bool:
        values.mul_(unpacked)
    else:
        values.view(-1).index_fill_(0, unpacked, 0)
