"""The large products of a frozen layer on a CPU, by oneDNN where torch would ask MKL.

torch gives a product of float32 matrices to MKL, whatever the processor. oneDNN, which every build for x86 carries too
(for convolutions, half precision and compiled models), takes 0.74 to 0.96 of MKL's time on an AMD EPYC with AVX-512 for
products of 2²⁵ multiplications and more, on two threads 0.57 to 0.94; on one with AVX2 alone it takes 0.93 to 1.49
(``benchmarks/products.py``). Both add up in float32, in another order.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from weightlora.processor import processor_name

#: Multiplications below which a call (10 µs more than torch's, 0.5 ms for a new shape) costs what it gains.
LEAST_WORK = 2**25


def takes(left: Tensor, right: Tensor) -> bool:
    """Whether oneDNN computes ``left @ right``, of (tokens, k) and (k, features); else they are left to torch.

    Example:
        >>> takes(torch.ones(512, 512), torch.ones(512, 512, dtype=torch.float64))
        False
    """
    return (
        left.numel() * right.shape[1] >= LEAST_WORK
        and left.dtype == right.dtype == torch.float32
        and left.is_cpu
        and right.is_cpu
        and type(left) is Tensor  # neither fake nor sharded
        and type(right) in (Tensor, nn.Parameter)
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and is_quicker_here()
        and _linear() is not None
    )


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``left @ right + bias``; autograd does not see it.

    Args:
        left: (tokens, k).
        right: (k, features).
        bias: (features,).

    Example:
        >>> product(torch.ones(2, 3), torch.ones(3, 1))
        tensor([[3.],
                [3.]])
    """
    linear = _linear() if takes(left, right) else None
    if linear is not None:
        return linear.default(left, right.t(), bias, "none", [], "")
    return left @ right if bias is None else torch.addmm(bias, left, right)


@cache
def is_quicker_here() -> bool:
    """Whether this processor is of the kind where oneDNN was measured to be the quicker: AMD's with AVX-512.

    A clock would know better, but a training would then not repeat itself bit by bit: where the two are close, the
    library, and with it the rounding, would be another at the next run.
    """
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return wide and bool(re.search(r"\bAMD\b|AuthenticAMD", processor_name()))  # "AMD64" is any x86 to Windows


@cache
def _linear() -> Any:
    """The operator that compiled models call; it is private to torch, and a later one may not have it."""
    try:
        return torch.ops.mkldnn._linear_pointwise
    except AttributeError:
        return None
