"""The rule ``first_order``: how much the loss would fall, to first order, if each adapter started to move."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from weightlora.selection._jackknife import GROUPS, jackknife
from weightlora.selection.rules.base import GradientRule, Scores
from weightlora.selection.stage import let_train

if TYPE_CHECKING:
    from weightlora.plan.budget import Chooser
    from weightlora.selection.stage import Stage


@dataclass(frozen=True)
class FirstOrder(GradientRule):
    """Score a site by ‖mean ∂L/∂B‖₁ over T batches at B = 0, where A, B and the gates stay as they are.

    The first Adam step from B = 0 moves B by −lr·sign(∂L/∂B). The gate's gradient is then −lr·‖∂L/∂B‖₁, so this score
    is the gate's gain to first order. It needs no optimizer, and the mean over batches reduces their noise.

    Args:
        head_steps: Steps in which a new head is trained alone first; None: 20 where there is a head, else 0.

    Raises:
        OptionError: A value is out of its range.

    Example:
        >>> FirstOrder(head_steps=5).head_steps
        5
    """

    name: ClassVar[str] = "first_order"

    def score(self, stage: Stage, steps: Sequence[int], budget: Chooser) -> Generator[tuple[int, Scores]]:  # noqa: ARG002 - nothing is dropped
        """Yield the scores; only B requires gradients."""
        matrices = stage.parameters("lora_B")
        let_train(stage, matrices)
        groups = min(GROUPS, steps[0])
        sums = [[torch.zeros_like(b, dtype=torch.float32) for b in matrices] for _ in range(groups + 1)]  # last: of all
        history: list[tuple[float, ...]] = []
        for step in range(steps[-1]):
            stage.backward("scoring", step + 1, matrices)
            for b, group, total in zip(matrices, sums[step % groups], sums[-1], strict=True):
                if b.grad is not None:
                    group += b.grad
                    total += b.grad
                    b.grad = None
            history.append(_sizes(sums[-1:], step + 1))
            if step + 1 in steps:
                yield step + 1, _scores(history, sums[:-1])


def _scores(history: Sequence[tuple[float, ...]], sums: Sequence[Sequence[Tensor]]) -> Scores:
    """The last scores of ``history``, where ``sums`` has the gradients of each group of batches."""
    counts = [len(range(group, len(history), len(sums))) for group in range(len(sums))]

    def score(chosen: Sequence[int]) -> Tensor:
        return torch.tensor(_sizes([sums[i] for i in chosen], sum(counts[i] for i in chosen)))

    known, last = jackknife(score, len(sums)), history[-1]
    moved = tuple(gain > 0 for gain in last)
    return Scores(tuple(history), moved, last, errors=known.errors, halves=known.halves)


def _sizes(sums: Sequence[Sequence[Tensor]], steps: int) -> tuple[float, ...]:
    """‖mean ∂L/∂B‖₁ of each site, where the gradients of ``steps`` batches are added up in ``sums``."""
    totals = [torch.stack(parts).sum(0) for parts in zip(*sums, strict=True)]
    return tuple(torch.stack([(total.abs().sum() / steps).cpu() for total in totals]).tolist())
