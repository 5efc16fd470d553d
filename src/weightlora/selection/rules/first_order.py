"""The rule ``first_order``: how much the loss would fall, to first order, if each adapter started to move."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from weightlora.selection._gradient_sizes import GradientSizes
from weightlora.selection.rules.base import GradientRule, Scores
from weightlora.selection.stage import let_train

if TYPE_CHECKING:
    from weightlora.plan.budget import Chooser
    from weightlora.plan.ranking import Ranking
    from weightlora.selection.stage import Stage


@dataclass(frozen=True)
class FirstOrder(GradientRule):
    """Score a site by ‖mean ∂L/∂B‖₁ over T batches at B = 0, where A, B and the gates stay as they are.

    The first Adam step from B = 0 moves B by −lr·sign(∂L/∂B). The gate's gradient is then −lr·‖∂L/∂B‖₁, so this score
    is the gate's gain to first order. It needs no optimizer, and the mean over batches reduces their noise.

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

    name: ClassVar[str] = "first_order"
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
    known, last = found.estimate(), history[-1]
    moved = tuple(gain > 0 for gain in last)
    return Scores(tuple(history), moved, last, errors=known.errors, halves=known.halves)
