"""The rule ``pursuit``: sites are kept a few at a time, by the gradient that the trained ones leave."""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from weightlora.errors import OptionError
from weightlora.plan.budget import Spread
from weightlora.selection.rules.base import Rule, Scores
from weightlora.selection.rules.first_order import GradientSizes
from weightlora.selection.stage import let_train, switched_off, train_adapters

if TYPE_CHECKING:
    from weightlora.plan.budget import Chooser
    from weightlora.selection.stage import Stage


@dataclass(frozen=True)
class Pursuit(Rule):
    """Keep a few sites by ‖mean ∂L/∂B‖₁, train them and a new head, score the others again, and so on.

    The first sites are those of ``first_order``. Others that would learn the same have little gradient left once these
    are trained, so that the kept sites complement each other. This is orthogonal matching pursuit (Pati et al. 1993)
    with adapters for atoms and a few steps of AdamW for the exact fit.

    T steps train adapters, in equal parts between the rounds. There are six rounds, or K or T + 1 where that is less.
    Each scores the sites on four further batches and keeps the same number of them, as far as the budget's K can be
    divided. A site's score is the one by which it was kept; that of the others is what they have in the last round,
    where the kept sites have been trained.

    Args:
        head_steps: Steps in which a new head is trained alone first; None: 20 where there is a head, else 0.

    Raises:
        OptionError: A value is out of its range.

    Example:
        >>> Pursuit().batches([100])
        124
    """

    trains_adapters: ClassVar[bool] = True
    least_steps: ClassVar[int] = 100
    # The numbers that the study had in all of its tables (docs/lab/choice.md).
    rounds: ClassVar[int] = 6
    """How often sites are scored and some of them kept."""
    probes: ClassVar[int] = 4
    """Further batches in each round that sites are scored on."""

    def batches(self, steps: Sequence[int]) -> int:
        """T batches to train on, and those that sites are scored on."""
        return steps[-1] + self.rounds * self.probes

    def score(self, stage: Stage, steps: Sequence[int], budget: Chooser) -> Generator[tuple[int, Scores]]:
        """Yield the scores after T steps; the history has a row for each round.

        Raises:
            OptionError: The budget spreads the sites.
        """
        if isinstance(budget, Spread):
            raise OptionError(
                "rule='pursuit' does not go with ranking='spread'; give another ranking, or take another rule"
            )
        names = list(stage.layers)
        kept: dict[int, _Score] = {}
        scored = self._scored(stage, kept)
        history = [tuple(score.size for score in scored)]
        rounds = min(self.rounds, steps[-1] + 1, max(1, len(budget.choose(history[0]))))
        for done in range(1, rounds + 1):
            kept = {i: scored[i] for i in more_kept(budget, history[-1], kept, Fraction(done, rounds))}
            if done < rounds:
                count = len(range(done - 1, steps[-1], rounds - 1))
                with switched_off([layer for i, layer in enumerate(stage.layers.values()) if i not in kept]):
                    train_adapters(
                        stage, steps=count, learning_rate=stage.learning_rate, names=[names[i] for i in kept]
                    )
                scored = self._scored(stage, kept)
                history.append(tuple(score.size for score in scored))
        yield (
            steps[-1],
            Scores(
                tuple(history),
                has_gradient=tuple(size > 0 for size in history[0]),
                sizes=_kept_first(history[-1], kept),
                errors=tuple(score.error for score in scored),
                halves=(tuple(score.half for score in scored), tuple(score.other_half for score in scored)),
            ),
        )

    def _scored(self, stage: Stage, kept: Mapping[int, _Score]) -> list[_Score]:
        """‖mean ∂L/∂B‖₁ of every site over the next batches, but for kept sites what they were kept by."""
        matrices = stage.parameters("lora_B")
        let_train(stage, matrices)
        found = GradientSizes(matrices, batches=self.probes)
        for step in range(self.probes):
            stage.backward("scoring", step + 1, matrices)
            found.add()
        known = found.estimate()
        scores = map(_Score, known.scores, known.errors, *known.halves)
        return [kept.get(i, score) for i, score in enumerate(scores)]


class _Score(NamedTuple):
    """The score of a site in one round."""

    size: float
    error: float
    half: float
    other_half: float


def more_kept(budget: Chooser, scores: Sequence[float], kept: Collection[int], share: Fraction) -> list[int]:
    """Return the kept sites and the best others, as many as this share of those that the budget holds.

    Args:
        budget: What may be kept in the end.
        scores: Of all sites.
        kept: Positions of those that are kept already; they stay.
        share: Of the sites that the budget holds now, in (0, 1].

    Example:
        >>> from weightlora.plan.budget import Budget
        >>> more_kept(Budget.of_count(4, n=5), [1.0, 2.0, 3.0, 4.0, 5.0], kept=[0], share=Fraction(1, 2))
        [0, 4]
    """
    sizes = _kept_first(scores, kept)
    wanted = sorted(budget.choose(sizes), key=lambda i: -sizes[i])
    # Where a large site takes the place of several, the budget holds fewer than in the round before.
    return wanted[: max(len(kept), math.ceil(len(wanted) * share))]


def _kept_first(scores: Sequence[float], kept: Collection[int]) -> tuple[float, ...]:
    """What a budget chooses by: a kept site counts more than all scores together, so that the others get the rest."""
    all_together = math.fsum(scores)
    return tuple(score + all_together if i in kept else score for i, score in enumerate(scores))
