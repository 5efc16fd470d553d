"""The large products of a frozen layer on a CPU, by oneDNN where that is quicker than MKL, which torch would ask.

torch gives a product of float32 matrices to MKL, whatever the processor. oneDNN, which every build for x86 carries too
(for convolutions, half precision and compiled models), takes 0.74 to 0.96 of MKL's time on one AMD EPYC, for products
of 2²⁵ multiplications and more, and 0.93 to 1.41 on another of that name (``benchmarks/products.py``). So the two are
timed once in a process. Both add up in float32, in another order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

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
        and not torch.are_deterministic_algorithms_enabled()  # the next process may find the other one quicker
        and is_quicker(torch.get_num_threads())
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
    if takes(left, right):
        return by_onednn(left, right, bias)
    return left @ right if bias is None else torch.addmm(bias, left, right)


@cache
def is_quicker(_threads: int) -> bool:
    """Whether oneDNN won on this processor with so many threads: a race of some 0.1 s at the first large product.

    They run a layer of MiniLM forwards and backwards, eight times in turns; the quickest run counts. MKL may take 3 %
    longer: it adds to the adapter's product for nothing, where oneDNN's takes another pass over the output.
    """
    if _linear() is None:
        return False
    cpu: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    x, dy, weight = torch.ones(256, 384, **cpu), torch.ones(256, 1536, **cpu), torch.ones(1536, 384, **cpu)
    runners: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (by_onednn, torch.mm)
    best = [float("inf")] * len(runners)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for _ in range(8):
            for place, run in enumerate(runners):
                start = time.perf_counter()
                run(x, weight.t())
                run(dy, weight)
                best[place] = min(best[place], time.perf_counter() - start)
    return best[0] < 0.97 * best[1]


def by_onednn(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what :func:`product` returns, computed by oneDNN whatever its size."""
    return _linear().default(left, right.t(), bias, "none", [], "")


@cache
def _linear() -> Any:
    """The operator that compiled models call; it is private to torch, and a later one may not have it."""
    try:
        return torch.ops.mkldnn._linear_pointwise
    except AttributeError:
        return None
