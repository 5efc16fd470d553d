"""What a rule is: it scores every site in a few steps. What rules share: scores with their errors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from weightlora.errors import OptionError
from weightlora.selection.rules import RULES

if TYPE_CHECKING:
    from weightlora.plan.budget import Chooser, Ranking
    from weightlora.selection.stage import Stage

#: Groups of batches, at most; each costs as much memory as the gradients that a rule sums.
GROUPS = 8


@dataclass(frozen=True)
class Scores:
    """The scores that a rule found, in the order of the sites' names."""

    history: tuple[tuple[float, ...], ...]
    """The scores after each step; the last ones count."""
    has_gradient: tuple[bool, ...]
    """Whether the loss depended on the site at all."""
    sizes: tuple[float, ...]
    """What the budget ranks sites by, such as the size of a score."""
    errors: tuple[float, ...] = ()
    """Standard error of each last score over the batches; empty where a rule reads none."""
    halves: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """The last scores by either half of the batches; None where a rule reads none."""
    ranks: tuple[tuple[float, ...], ...] = ()
    """The score of each rank of each site, where a rule scores single ranks: the budget is spent rank by rank."""
    gates: tuple[float, ...] | None = None
    """What each site's B is multiplied by at the end of the scoring; None where there are no gates."""

    @property
    def final(self) -> tuple[float, ...]:
        """The scores after the last step; a site is kept only where its score is positive."""
        return self.history[-1]


@dataclass(frozen=True)
class Rule(ABC):
    """Scores sites: the base of all rules, ours and yours.

    A rule is a frozen dataclass. Its fields are its settings, which the plan records. By default it reads one batch
    for each of T steps. The model has a rule of its own: ``select(..., rule=MyRule())``, or in a recipe
    ``rule: package.module:MyRule``.

    Args:
        head_steps: Steps in which a new head is trained alone first; None: 20 where there is a head, else 0.

    Raises:
        OptionError: A value is out of its range.
    """

    knobs: ClassVar[tuple[str, ...]] = ()
    """Settings that an error or a warning names where too few sites have a positive score."""
    trains_adapters: ClassVar[bool] = False
    """Whether :meth:`score` trains A and B, so that ``warm_start`` can use them."""
    least_steps: ClassVar[int] = 20
    """T where none is given and the training is short."""
    ranking: ClassVar[Ranking] = "score"
    """How sites compete where no ranking is given and the budget is a number of adapters or parameters."""
    # docs/lab/selection.md: after 20 steps a quarter of the first gradient's gain is real, with a fresh head none is.
    head_steps: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        given: object = self.head_steps
        allowed = given is None or (isinstance(given, int) and given >= 0)  # pyright: ignore[reportUnnecessaryIsInstance]
        require(allowed, f"head_steps={given!r}", "a whole number, 0 or more")

    @property
    def name(self) -> str:
        """What the plan calls it: the first name of its class in ``RULES``, or ``package.module:Class``."""
        path = f"{type(self).__module__}:{type(self).__qualname__}"
        return next((entry.name for entry in RULES if entry.path == path), path)

    @property
    def scores_ranks(self) -> bool:
        """Whether it scores single ranks, so that the budget is spent rank by rank."""
        return False

    def batches(self, steps: Sequence[int]) -> int:
        """Return how many batches :meth:`score` reads for these ``steps``."""
        return steps[-1]

    def passes(self, steps: Sequence[int]) -> int:
        """Return how many times :meth:`score` runs the model on a batch."""
        return self.batches(steps)

    @abstractmethod
    def score(self, stage: Stage, steps: Sequence[int], budget: Chooser) -> Generator[tuple[int, Scores]]:
        """Yield T and the scores after T steps, for each T of ``steps``; whoever has seen enough stops reading.

        A rule that cannot score before the end yields the last scores only.

        Args:
            stage: The model with plain LoRA on every site.
            steps: T in ascending order, such as 8, 16, 30. A fixed T is the only one.
            budget: What may be kept; only rules that drop sites on the way need it.
        """


@dataclass(frozen=True)
class BlindRule(Rule):
    """A rule that reads no batch, so that there is no head to train before."""

    head_steps: int | None = field(default=0, init=False, repr=False)

    def batches(self, steps: Sequence[int]) -> int:  # noqa: ARG002
        """None."""
        return 0


def require(condition: bool, found: str, allowed: str) -> None:
    """Raise unless a setting is in its range.

    Raises:
        OptionError: With the value found and what is allowed.
    """
    if not condition:
        raise OptionError(f"{found} is not allowed: give {allowed}")


# -- the errors of scores ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """Scores, their standard errors, and the scores of either half of the batches."""

    scores: tuple[float, ...]
    errors: tuple[float, ...]
    halves: tuple[tuple[float, ...], tuple[float, ...]]


def jackknife(score: Callable[[Sequence[int]], Tensor], groups: int) -> Estimate:
    """Return the scores of all groups with their standard errors.

    The standard error is √((g−1)/g · Σᵢ (sᵢ − s̄)²), where sᵢ is the score without group i (Efron and Stein 1981). For
    a mean over groups of one size this is the usual standard error of a mean.

    Args:
        score: ``score(chosen)``: the scores of all sites, by the batches of the chosen groups.
        groups: How many there are, at least 2.

    Example:
        >>> batches = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
        >>> jackknife(lambda chosen: batches[list(chosen)].mean(0), 2)
        Estimate(scores=(2.0, 5.0), errors=(1.0, 0.0), halves=((1.0, 5.0), (3.0, 5.0)))
    """
    whole = score(range(groups))
    without = torch.stack([score([i for i in range(groups) if i != left]) for left in range(groups)])
    errors = ((without - without.mean(0)).square().sum(0) * (groups - 1) / groups).sqrt()
    halves = score(range(0, groups, 2)), score(range(1, groups, 2))
    return Estimate(_numbers(whole), _numbers(errors), (_numbers(halves[0]), _numbers(halves[1])))


def batch_means(seen: Tensor) -> Scores:
    """Return the running means of the rows of ``seen``, with their standard errors over the rows.

    Args:
        seen: One row for each batch, one column for each site, shape (steps, n). A site with zeros only had no
            gradient.

    Example:
        >>> scores = batch_means(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> scores.history, scores.has_gradient, scores.errors
        (((1.0, 0.0), (2.0, 0.0)), (True, False), (1.0, 0.0))
    """
    known = jackknife_of_rows(seen, lambda rows: rows.mean(0))
    means = seen.cumsum(0) / torch.arange(1, len(seen) + 1, dtype=seen.dtype)[:, None]
    history = tuple(tuple(row) for row in means.tolist())
    moved = tuple((seen != 0).any(0).tolist())
    return Scores(history, moved, history[-1], errors=known.errors, halves=known.halves)


def jackknife_of_rows(rows: Tensor, score: Callable[[Tensor], Tensor]) -> Estimate:
    """Return the jackknife of scores that are computed of what each batch gave.

    Args:
        rows: One row for each batch, (steps, ...); batch t is in group t modulo the number of groups.
        score: The scores of all sites, by some of the rows.
    """
    groups = min(GROUPS, len(rows))
    return jackknife(lambda chosen: score(rows[[t for t in range(len(rows)) if t % groups in chosen]]), groups)


def _numbers(values: Tensor) -> tuple[float, ...]:
    return tuple(values.double().tolist())
