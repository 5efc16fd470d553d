"""The rule ``first_order``: how much the loss would fall, to first order, if each adapter started to move."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from weightlora.selection.rules.base import GROUPS, Estimate, Rule, Scores, jackknife
from weightlora.selection.stage import let_train

if TYPE_CHECKING:
    from weightlora.plan.budget import Chooser, Ranking
    from weightlora.selection.stage import Stage


@dataclass(frozen=True)
class FirstOrder(Rule):
    """Score a site by ‖mean ∂L/∂B‖₁ over T batches at B = 0, where A, B and the gates stay as they are.

    The first Adam step from B = 0 moves B by −η·sign(∂L/∂B) at the learning rate η. The gate's gradient is then
    −η·‖∂L/∂B‖₁, so this score is the gate's gain to first order. It needs no optimizer, and the mean over batches
    reduces their noise.

    Neighbours have gradients of about the same size, and little is gained by keeping both. So a budget in adapters or
    parameters is spread over the depth (``ranking="spread"``) unless another ranking is asked for.

    Args:
        head_steps: Steps in which a new head is trained alone first; None: 20 where there is a head, else 0.

    Raises:
        OptionError: A value is out of its range.

    Example:
        >>> FirstOrder(head_steps=5).head_steps
        5
    """

    ranking: ClassVar[Ranking] = "spread"

    def score(self, stage: Stage, steps: Sequence[int], budget: Chooser) -> Generator[tuple[int, Scores]]:  # noqa: ARG002 - nothing is dropped
        """Yield the scores; only B requires gradients."""
        matrices = stage.parameters("lora_B")
        let_train(stage, matrices)
        found = GradientSizes(matrices, batches=steps[0])
        history: list[tuple[float, ...]] = []
        for step in range(steps[-1]):
            stage.backward("scoring", step + 1, matrices)
            found.add()
            history.append(found.sizes())
            if step + 1 in steps:
                yield step + 1, _scores(history, found)


def _scores(history: Sequence[tuple[float, ...]], found: GradientSizes) -> Scores:
    last = history[-1]
    moved = tuple(gain > 0 for gain in last)
    if len(history) == 1:  # of one batch no error is known
        return Scores(tuple(history), moved, last)
    known = found.estimate()
    return Scores(tuple(history), moved, last, errors=known.errors, halves=known.halves)


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
