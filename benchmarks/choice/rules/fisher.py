"""The rule ``fisher``: the empirical Fisher information of each adapter at B = 0."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weightlora.selection.rules.base import Rule, Scores, batch_means
from weightlora.selection.rules.kappa_tune import wide
from weightlora.selection.stage import let_train

if TYPE_CHECKING:
    from weightlora.plan.budget import Chooser
    from weightlora.selection.stage import Stage


@dataclass(frozen=True)
class Fisher(Rule):
    """Score a site by the mean over T batches of ‖∂L/∂B‖²_F at B = 0, the trace of B's empirical Fisher information.

    FIM-LoRA (arXiv:2605.16800) ranks sites by the mean of g² over entries and batches. Here the entries are summed, so
    that a site counts as a whole. g is the gradient of a batch's mean loss, not of one example's loss: a batch's noise
    counts less than in the Fisher information of single examples. Unlike ``first_order``, gradients of opposite signs
    in different batches do not cancel.

    Args:
        head_steps: Steps in which a new head is trained alone first; None: 20 where there is a head, else 0.

    Raises:
        OptionError: A value is out of its range.

    Example:
        >>> Fisher(head_steps=5)
        Fisher(head_steps=5)
    """

    def score(self, stage: Stage, steps: Sequence[int], budget: Chooser) -> Generator[tuple[int, Scores]]:  # noqa: ARG002 - nothing is dropped
        """Yield the scores; only B requires gradients."""
        matrices = stage.parameters("lora_B")
        let_train(stage, matrices)
        seen: list[Tensor] = []
        for step in range(1, steps[-1] + 1):
            stage.backward("scoring", step, matrices)
            norms = [
                torch.zeros(()) if b.grad is None else torch.linalg.vector_norm(b.grad, dtype=wide(b.grad)).cpu()
                for b in matrices
            ]
            seen.append(torch.stack(norms).double().square())  # in fp32 the square of a small norm would be zero
            for b in matrices:
                b.grad = None
            if step in steps:
                yield step, batch_means(torch.stack(seen))
