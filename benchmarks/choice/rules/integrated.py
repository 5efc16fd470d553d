"""Variants of ``integrated`` that the study compared, and that gain nothing over it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from weightlora.selection.rules.base import require
from weightlora.selection.rules.integrated import Integrated
from weightlora.selection.stage import train_adapters

if TYPE_CHECKING:
    from weightlora.plan.budget import Chooser
    from weightlora.selection.rules.base import Scores
    from weightlora.selection.stage import Stage


@dataclass(frozen=True)
class Varied(Integrated):
    """``integrated`` at another learning rate, or with other points of the quadrature.

    Args:
        per: As in ``Integrated``.
        most_ranks: As in ``Integrated``.
        nodes: Points of the quadrature.
        lr_scale: Factor of the adapters' learning rate; None: √(K/m) where the budget holds K of m trained sites.
        head_steps: As in ``Integrated``.

    Example:
        >>> Varied(lr_scale=1.0)
        Varied(head_steps=None, per='site', most_ranks=None, nodes=3, lr_scale=1.0)
    """

    nodes: int = 3
    lr_scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.nodes >= 1, f"nodes={self.nodes!r}", "1 or more points")
        scale = self.lr_scale
        require(scale is None or 0 < scale < float("inf"), f"lr_scale={scale!r}", "a positive number, or None")

    def rate_scale(self, budget: Chooser, stage: Stage, trained: int) -> float:
        """Return the factor that was asked for."""
        return super().rate_scale(budget, stage, trained) if self.lr_scale is None else self.lr_scale


@dataclass(frozen=True)
class Eliminated(Varied):
    """``integrated`` in rounds: each trains for T/rounds steps and drops the sites with the lowest scores.

    Those that stay learn to do without the others. Sites shrink from n to the budget's K by the same factor each round.
    A dropped site has the score 0.

    Args:
        per: As in ``Integrated``.
        most_ranks: As in ``Integrated``.
        nodes: Points of the quadrature.
        lr_scale: As in ``Varied``.
        rounds: How often sites are scored.
        head_steps: As in ``Integrated``.

    Example:
        >>> Eliminated(rounds=2).batches([10])
        18
    """

    rounds: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rounds >= 2, f"rounds={self.rounds!r}", "2 or more rounds")

    def batches(self, steps: Sequence[int]) -> int:
        """T batches to train on, and those of each round that the scores are read from."""
        return steps[-1] + self.rounds * self.probes

    def passes(self, steps: Sequence[int]) -> int:
        """One for each batch to train on, and one for each node on the others."""
        return steps[-1] + self.rounds * self.probes * self.nodes

    def score(self, stage: Stage, steps: Sequence[int], budget: Chooser) -> Generator[tuple[int, Scores]]:
        """Yield the scores after several rounds, each of which trains and reads only the sites that stay.

        Raises:
            OptionError: There are fewer steps than rounds.
        """
        require(steps[-1] >= self.rounds, f"steps={steps[-1]}", f"at least rounds={self.rounds}")
        most = self.most(stage, budget)
        names = list(stage.layers)
        staying = list(range(len(names)))
        history: list[tuple[float, ...]] = []
        found: list[Scores] = []
        for done in range(self.rounds):
            if found:
                last = found[-1].final
                share = len(budget.choose(last)) / len(names)
                count = round(len(names) * share ** (done / self.rounds))
                staying = sorted(sorted(staying, key=lambda i: -last[i])[:count])
                _switch_off(stage, staying)
            trained = [names[i] for i in staying]
            scale = self.rate_scale(budget, stage, len(trained))
            count = len(range(done, steps[-1], self.rounds))
            train_adapters(stage, steps=count, learning_rate=stage.learning_rate, names=trained, scale=scale)
            found.append(self.read(stage, most))
            history += found[-1].history
        # In the first round all sites are there.
        yield steps[-1], replace(found[-1], history=tuple(history), has_gradient=found[0].has_gradient)


def _switch_off(stage: Stage, staying: Sequence[int]) -> None:
    """Set B of all other sites to zero: their adapters add nothing from here on."""
    kept = set(staying)
    with torch.no_grad():
        for i, matrix in enumerate(stage.parameters("lora_B")):
            if i not in kept:
                matrix.zero_()
