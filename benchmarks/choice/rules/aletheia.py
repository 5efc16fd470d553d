"""The rule ``aletheia``: whole blocks, by the gradients of their weights."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from weightlora.selection.rules.base import Rule, Scores, batch_means

from .weight_gradients import gradient_norms

if TYPE_CHECKING:
    from weightlora.plan.budget import Chooser
    from weightlora.selection.stage import Stage


@dataclass(frozen=True)
class Aletheia(Rule):
    """Give each site the score of its block: the mean over T batches of Σ ‖∂L/∂W‖_F over the block's sites.

    Aletheia (arXiv:2604.15351) keeps the best half of the blocks. All sites of a block have the same score, so a budget
    is spent on whole blocks as far as it goes. A site outside all blocks is a block of its own.

    Its code (aletheia-lora 0.1.2) differs: it reads five single rows, adds the norms of a block's biases and
    normalisations, and takes the loss over all tokens.

    A step needs memory for the gradients of all adapted weights, in fp32.

    Args:
        head_steps: Steps in which a new head is trained alone first; None: 20 where there is a head, else 0.

    Raises:
        OptionError: A value is out of its range.

    Example:
        >>> Aletheia()
        Aletheia(head_steps=None)
    """

    def score(self, stage: Stage, steps: Sequence[int], budget: Chooser) -> Generator[tuple[int, Scores]]:  # noqa: ARG002 - nothing is dropped
        """Yield the scores; only B requires gradients, so that the backward pass reaches every site."""
        blocks = [site.block or site.name for site in stage.sites]
        places = {block: place for place, block in enumerate(dict.fromkeys(blocks))}
        own = torch.tensor([places[block] for block in blocks])
        for step, norms in gradient_norms(stage, steps):
            sums = norms.new_zeros(len(norms), len(places)).index_add(1, own, norms)
            # Of a block that has a gradient, a site may have none.
            yield step, replace(batch_means(sums[:, own]), has_gradient=tuple((norms != 0).any(0).tolist()))
