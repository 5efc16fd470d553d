"""The rule ``kappa_tune``: layers with well-conditioned weights first."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from weightlora.selection._weight_gradients import full_weight
from weightlora.selection.rules.base import OnePass, Scores

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

    from weightlora.plan.budget import Chooser
    from weightlora.selection.stage import Stage


@dataclass(frozen=True)
class KappaTune(OnePass):
    """Score a site by 1 ÷ κ = σ_min ÷ σ_max of its frozen weight, the inverse condition number (KappaTune).

    No batch is read and nothing is trained, so that the score does not depend on the task. Each weight takes one
    singular value decomposition without vectors, in fp32. A weight of deficient rank scores 0 and is not kept.

    PEFT's ``KappaTuneSelector`` ranks layers by the same number. It is not used here: it returns names and no numbers,
    leaves out GPT-2's transposed layers, and would rank LoRA's own matrices as well.

    Example:
        >>> KappaTune().head_steps
        0
    """

    name: ClassVar[str] = "kappa_tune"
    knobs: ClassVar[tuple[str, ...]] = ()
    trains_adapters: ClassVar[bool] = False

    @property
    def head_steps(self) -> int:
        """0: no batch is read."""
        return 0

    def batches(self, steps: Sequence[int]) -> int:  # noqa: ARG002
        """None."""
        return 0

    def score(self, stage: Stage, steps: Sequence[int], budget: Chooser) -> Generator[tuple[int, Scores]]:  # noqa: ARG002 - reads no batch
        """Yield the scores, in one row."""
        scores = tuple(_inverse_condition(layer) for layer in stage.layers.values())
        yield steps[-1], Scores((scores,), (True,) * len(scores), scores)


@torch.no_grad()
def _inverse_condition(layer: LoraLayer) -> float:
    """σ_min ÷ σ_max of the base layer's weight; 0 where the weight is zero."""
    values = torch.linalg.svdvals(full_weight(layer))
    return float(values[-1] / values[0]) if values[0] > 0 else 0.0
