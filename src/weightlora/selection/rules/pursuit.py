"""The rule ``pursuit``: sites are kept a few at a time, by the gradient that the trained ones leave."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from weightlora.errors import OptionError
from weightlora.plan.budget import GainShare
from weightlora.selection._gradient_sizes import GradientSizes
from weightlora.selection.rules.base import Scores, require, require_head_steps
from weightlora.selection.stage import let_train, train_adapters

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

    from weightlora.plan.budget import Chooser
    from weightlora.selection._jackknife import Estimate
    from weightlora.selection.stage import Stage

#: By what factor of the largest score kept sites go before the others, also per parameter.
_FIRST = 1e9


@dataclass(frozen=True)
class Pursuit:
    """Keep a few sites by ‖mean ∂L/∂B‖₁, train them and a new head, score the others again, and so on.

    The first sites are those of ``first_order``. Others that would learn the same have little gradient left once these
    are trained, so that the kept sites complement each other. This is orthogonal matching pursuit (Pati et al. 1993)
    with adapters for atoms and a few steps of AdamW for the exact fit.

    T steps train adapters, in equal parts between the rounds. Each round keeps the same number of sites, as far as the
    budget's K can be divided. A site's score is the one by which it was kept; that of the others is what they have in
    the last round, where the kept sites have been trained.

    Args:
        rounds: How often sites are scored and some of them kept; K or T + 1 where that is less.
        probes: Further batches in each round that sites are scored on.
        head_steps: Steps in which a new head is trained alone first; None: 20 where there is a head, else 0.

    Raises:
        OptionError: A value is out of its range.

    Example:
        >>> Pursuit(rounds=3)
        Pursuit(rounds=3, probes=4, head_steps=None)
    """

    rounds: int = 6
    probes: int = 4
    head_steps: int | None = None
    name: ClassVar[str] = "pursuit"
    knobs: ClassVar[tuple[str, ...]] = ()
    trains_adapters: ClassVar[bool] = True
    least_steps: ClassVar[int] = 100

    def __post_init__(self) -> None:
        require(self.rounds >= 2, f"rounds={self.rounds!r}", "2 or more rounds")
        require(self.probes >= 2, f"probes={self.probes!r}", "2 or more batches")
        require_head_steps(self.head_steps)

    def batches(self, steps: Sequence[int]) -> int:
        """T batches to train on, and those that sites are scored on."""
        return steps[-1] + self.rounds * self.probes

    def passes(self, steps: Sequence[int]) -> int:
        """One for each batch."""
        return self.batches(steps)

    def score(self, stage: Stage, steps: Sequence[int], budget: Chooser) -> Generator[tuple[int, Scores]]:
        """Yield the scores after T steps; the history has a row for each round.

        Raises:
            OptionError: The budget is a share of the scores.
        """
        if isinstance(budget, GainShare):
            raise OptionError(
                "rule='pursuit' needs a budget that does not depend on the scores; give keep as a fraction, a number "
                "of adapters, parameters, bytes or a step time, or take another rule"
            )
        names = list(stage.layers)
        kept: dict[int, tuple[float, ...]] = {}
        history: list[tuple[float, ...]] = []
        rounds = min(self.rounds, steps[-1] + 1)
        while True:
            known = self._gradients(stage)
            scored = [tuple(values) for values in zip(known.scores, known.errors, *known.halves, strict=True)]
            scored = [kept.get(i, values) for i, values in enumerate(scored)]
            history.append(tuple(values[0] for values in scored))
            sizes = kept_first(history[-1], kept)
            wanted = sorted(budget.choose(sizes), key=lambda i: -sizes[i])
            rounds = min(rounds, max(1, len(wanted)))
            kept = {i: scored[i] for i in wanted[: -(-len(wanted) * len(history) // rounds)]}
            if len(history) == rounds:
                break
            count = len(range(len(history) - 1, steps[-1], rounds - 1))
            with _alone(stage.layers, [names[i] for i in kept]) as own:
                train_adapters(stage, steps=count, lr=stage.lr, names=own)
        _, errors, *halves = zip(*scored, strict=True)
        moved = tuple(score > 0 for score in history[0])
        sizes = kept_first(history[-1], kept)
        yield steps[-1], Scores(tuple(history), moved, sizes, errors=errors, halves=(halves[0], halves[1]))

    def _gradients(self, stage: Stage) -> Estimate:
        """‖mean ∂L/∂B‖₁ of every site over the next batches, with adapters and head as they are now."""
        matrices = stage.parameters("lora_B")
        let_train(stage, matrices)
        found = GradientSizes(matrices, batches=self.probes)
        for step in range(self.probes):
            stage.backward("scoring", step + 1, matrices)
            found.add()
        return found.estimate()


def kept_first(scores: Sequence[float], kept: Collection[int]) -> tuple[float, ...]:
    """Return what a budget chooses by, so that sites that are kept stay and the others compete for the rest.

    Args:
        scores: Of all sites.
        kept: Positions of those that are kept.

    Example:
        >>> from weightlora.plan.budget import Budget
        >>> Budget.of_count(2, n=3).choose(kept_first([1.0, 2.0, 3.0], {0}))
        [0, 2]
    """
    first = _FIRST * max(scores)
    return tuple(score + first if i in kept else score for i, score in enumerate(scores))


@contextmanager
def _alone(layers: Mapping[str, LoraLayer], names: Sequence[str]) -> Generator[Sequence[str]]:
    """Switch the adapters of all other sites off for the length of the block: with B = 0 they add nothing but time."""
    others = [layer for name, layer in layers.items() if name not in names]
    for layer in others:
        layer.enable_adapters(False)
    try:
        yield names
    finally:
        for layer in others:
            layer.enable_adapters(True)
