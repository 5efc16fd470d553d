"""The rule ``first_order``: how much the loss would fall, to first order, if each adapter started to move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from weightlora.selection.rules.base import Scores, require_head_steps
from weightlora.selection.stage import let_train

if TYPE_CHECKING:
    from weightlora.cost.knapsack import CostBudget
    from weightlora.plan.budget import Budget
    from weightlora.selection.stage import Stage


@dataclass(frozen=True)
class FirstOrder:
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

    head_steps: int | None = None
    name: ClassVar[str] = "first_order"
    knobs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        require_head_steps(self.head_steps)

    def score(self, stage: Stage, steps: int, budget: Budget | CostBudget) -> Scores:  # noqa: ARG002 - nothing is dropped
        """Return the scores; only B requires gradients."""
        matrices = stage.parameters("lora_B")
        let_train(stage, matrices)
        history: list[tuple[float, ...]] = []
        for step in range(1, steps + 1):
            stage.backward("scoring", step, matrices)  # gradients accumulate
            gains = [torch.zeros(()) if b.grad is None else b.grad.float().abs().sum() / step for b in matrices]
            history.append(tuple(torch.stack([gain.cpu() for gain in gains]).tolist()))
        return Scores(tuple(history), tuple(gain > 0 for gain in history[-1]), history[-1])
