"""The rule ``aletheia``: whole blocks, by the gradients of their weights."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from weightlora.model.sites import Site
from weightlora.selection._batch_means import batch_means
from weightlora.selection._weight_gradients import gradient_norms
from weightlora.selection.rules.base import GradientRule, Scores

if TYPE_CHECKING:
    from weightlora.plan.budget import Chooser
    from weightlora.selection.stage import Stage


@dataclass(frozen=True)
class Aletheia(GradientRule):
    """Give each site the score of its block: the mean over T batches of Σ ‖∂L/∂W‖_F over the block's sites.

    Aletheia (arXiv:2604.15351) keeps the best half of the blocks, which are also faster to train where they are the
    last ones. All sites of a block have the same score, so a budget is spent on whole blocks as far as it goes. A site
    outside all blocks is a block of its own.

    Its code (aletheia-lora 0.1.2) differs: it reads five single rows, adds the norms of a block's biases and
    normalisations, and takes the loss over all tokens.

    A step needs memory for the gradients of all adapted weights, in fp32.

    Args:
        head_steps: Steps in which a new head is trained alone first; None: 20 where there is a head, else 0.

    Raises:
        OptionError: A value is out of its range.

    Example:
        >>> Aletheia().name
        'aletheia'
    """

    name: ClassVar[str] = "aletheia"

    def score(self, stage: Stage, steps: Sequence[int], budget: Chooser) -> Generator[tuple[int, Scores]]:  # noqa: ARG002 - nothing is dropped
        """Yield the scores; only B requires gradients, so that the backward pass reaches every site."""
        blocks = [Site(name, 0, 0).block or name for name in stage.layers]
        same = torch.tensor([[one == other for other in blocks] for one in blocks], dtype=torch.float64)
        for step, norms in gradient_norms(stage, steps):
            yield step, batch_means(norms @ same)
