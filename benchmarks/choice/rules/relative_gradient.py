"""The rule ``relative_gradient``: the gradient of a site's full weight, relative to the weight."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weightlora.errors import SelectionError
from weightlora.selection.rules.base import Rule, Scores, batch_means
from weightlora.selection.rules.kappa_tune import full_weight

from .weight_gradients import gradient_norms

if TYPE_CHECKING:
    from weightlora.plan.budget import Chooser
    from weightlora.selection.stage import Stage


@dataclass(frozen=True)
class RelativeGradient(Rule):
    """Score a site by the mean over T batches of ‖∂L/∂W‖_F ÷ ‖W‖_F, where W is its frozen weight.

    This is the relative gradient norm, RGN, of auto-RGN (Lee et al. 2023, arXiv:2210.11466), for one weight instead of
    a layer. The adapter plays no part: neither A nor the rank changes the score.

    A step needs memory for the gradients of all adapted weights, in fp32.

    Args:
        head_steps: Steps in which a new head is trained alone first; None: 20 where there is a head, else 0.

    Raises:
        OptionError: A value is out of its range.

    Example:
        >>> RelativeGradient()
        RelativeGradient(head_steps=None)
    """

    def score(self, stage: Stage, steps: Sequence[int], budget: Chooser) -> Generator[tuple[int, Scores]]:  # noqa: ARG002 - nothing is dropped
        """Yield the scores; only B requires gradients, so that the backward pass reaches every site.

        Raises:
            SelectionError: A site's weight is zero.
        """
        sizes = _sizes(stage)
        for step, norms in gradient_norms(stage, steps):
            yield step, batch_means(norms / sizes)


def _sizes(stage: Stage) -> Tensor:
    """‖W‖_F of each site."""
    sizes = torch.stack([full_weight(layer).norm().cpu().double() for layer in stage.layers.values()])
    zero = [name for name, size in zip(stage.layers, sizes.tolist(), strict=True) if size == 0]
    if zero:
        raise SelectionError(
            f"the weight of {zero[0]} is zero, so no gradient is relative to it; leave the site out of target_modules, "
            "or use another rule"
        )
    return sizes
