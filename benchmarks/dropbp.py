"""DropBP (arXiv:2402.17812): the backward pass of random blocks is skipped; a row of benchmarks/equal_time.py."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def skipped_backward(blocks: Iterable[nn.Module], rate: float, *, seed: int) -> Generator[None]:
    """Skip the backward pass of each block with the probability ``rate`` in each forward pass of a training.

    The loss stays what it is. Past a skipped block the gradient takes the residual connection, so that it is that of
    ``x + f(x)`` with f held constant. The paper gives blocks that matter more a lower rate; here all have the same.

    Example:
        >>> import torch
        >>> x, block = torch.ones(2, requires_grad=True), nn.Linear(2, 2)
        >>> with skipped_backward([block], 1.0, seed=0):
        ...     out = block(x)
        >>> out.sum().backward()
        >>> bool((out == block(x)).all()), x.grad, block.weight.grad
        (True, tensor([1., 1.]), None)
    """
    random_number = random.Random(seed).random

    def skip(block: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not block.training or random_number() >= rate:
            return None
        (entered, *_) = args
        return output.detach() + (entered - entered.detach())

    handles = [block.register_forward_hook(skip) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
