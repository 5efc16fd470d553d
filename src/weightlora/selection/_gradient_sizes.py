"""The size of B's mean gradient at each site, with its jackknife error."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from weightlora.selection._jackknife import GROUPS, Estimate, jackknife


class GradientSizes:
    """‖mean ∂L/∂B‖₁ of each site over the batches that were added.

    Args:
        matrices: B of every site.
        batches: The fewest that will be added before :meth:`estimate` is asked for, at least 2.

    Example:
        >>> b = nn.Parameter(torch.zeros(2, 1))
        >>> found = GradientSizes([b], batches=2)
        >>> for x in (1.0, 3.0):
        ...     (b * torch.tensor([[x], [-1.0]])).sum().backward()
        ...     found.add()
        >>> found.sizes(), b.grad  # mean gradient: 2 and −1
        ((3.0,), None)
    """

    def __init__(self, matrices: Sequence[nn.Parameter], *, batches: int) -> None:
        groups = min(GROUPS, batches)
        self._matrices = matrices
        # One sum of gradients for each group of batches; the last one is of all.
        self._sums = [[torch.zeros_like(b, dtype=torch.float32) for b in matrices] for _ in range(groups + 1)]
        self._added = 0

    def add(self) -> None:
        """Take the gradients of a batch from the matrices; they have none afterwards."""
        group = self._sums[self._added % (len(self._sums) - 1)]
        for b, part, total in zip(self._matrices, group, self._sums[-1], strict=True):
            if b.grad is not None:
                part += b.grad
                total += b.grad
                b.grad = None
        self._added += 1

    def sizes(self) -> tuple[float, ...]:
        """The size at each site, over all batches."""
        return _sizes(self._sums[-1:], self._added)

    def estimate(self) -> Estimate:
        """The sizes with their standard errors, and those by either half of the batches."""
        groups = self._sums[:-1]
        counts = [len(range(group, self._added, len(groups))) for group in range(len(groups))]

        def score(chosen: Sequence[int]) -> Tensor:
            return torch.tensor(_sizes([groups[i] for i in chosen], sum(counts[i] for i in chosen)))

        return jackknife(score, len(groups))


def _sizes(sums: Sequence[Sequence[Tensor]], batches: int) -> tuple[float, ...]:
    """‖mean ∂L/∂B‖₁ of each site, where the gradients of so many batches are added up in ``sums``."""
    totals = [torch.stack(parts).sum(0) for parts in zip(*sums, strict=True)]
    return tuple(torch.stack([(total.abs().sum() / batches).cpu() for total in totals]).tolist())
