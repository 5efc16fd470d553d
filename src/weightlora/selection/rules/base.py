"""What a rule is: it scores every site by a few warm-up steps."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from weightlora.errors import OptionError

if TYPE_CHECKING:
    from weightlora.plan.budget import Chooser
    from weightlora.plan.ranking import Ranking
    from weightlora.selection.stage import Stage


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
    """What each site's B is multiplied by at the end of the warm-up; None where there are no gates."""

    @property
    def final(self) -> tuple[float, ...]:
        """The scores after the last step; a site is kept only where its score is positive."""
        return self.history[-1]


class Rule(Protocol):
    """Scores sites during the warm-up. A rule is a frozen dataclass, whose fields are recorded in the plan."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    name: ClassVar[str]
    """What the plan calls it."""
    knobs: ClassVar[tuple[str, ...]]
    """Settings that an error or a warning names where too few sites have a positive score."""
    trains_adapters: ClassVar[bool]
    """Whether :meth:`score` trains A and B, so that ``warm_start`` can use them."""
    least_steps: ClassVar[int]
    """T where none is given and the training is short."""
    ranking: ClassVar[Ranking]
    """How sites compete where no ranking is given and the budget is a number of adapters or parameters."""

    @property
    def head_steps(self) -> int | None:
        """Steps in which a new head is trained alone before the sites are scored; None: 20 where there is a head."""
        ...

    def batches(self, steps: Sequence[int]) -> int:
        """Return how many batches :meth:`score` reads for these ``steps``."""
        ...

    def passes(self, steps: Sequence[int]) -> int:
        """Return how many times :meth:`score` runs the model on a batch."""
        ...

    def score(self, stage: Stage, steps: Sequence[int], budget: Chooser) -> Generator[tuple[int, Scores]]:
        """Yield T and the scores after T steps, for each T of ``steps``; whoever has seen enough stops reading.

        A rule that cannot score before the end yields the last scores only.

        Args:
            stage: The model with plain LoRA on every site.
            steps: T in ascending order, such as 8, 16, 30. A fixed T is the only one.
            budget: What may be kept; only rules that drop sites on the way need it.
        """
        ...


class OnePass:
    """A rule that runs the model once on each of T batches."""

    least_steps: ClassVar[int] = 20
    ranking: ClassVar[Ranking] = "score"

    def batches(self, steps: Sequence[int]) -> int:
        """One for each step."""
        return steps[-1]

    def passes(self, steps: Sequence[int]) -> int:
        """One for each batch."""
        return self.batches(steps)


@dataclass(frozen=True)
class GradientRule(OnePass):
    """What rules have in common that read gradients of T batches at B = 0 and train no adapter."""

    head_steps: int | None = None
    """Steps in which a new head is trained alone first; None: 20 where there is a head, else 0."""
    knobs: ClassVar[tuple[str, ...]] = ()
    trains_adapters: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_head_steps(self.head_steps)


def require(condition: bool, found: str, allowed: str) -> None:
    """Raise unless a setting is in its range.

    Raises:
        OptionError: With the value found and what is allowed.
    """
    if not condition:
        raise OptionError(f"{found} is not allowed: give {allowed}")


def require_head_steps(head_steps: int | None) -> None:
    """Raise unless ``head_steps`` is None or a whole number from 0.

    Raises:
        OptionError: It is not.
    """
    given: object = head_steps
    allowed = given is None or (isinstance(given, int) and given >= 0)  # pyright: ignore[reportUnnecessaryIsInstance]
    require(allowed, f"head_steps={head_steps!r}", "a whole number, 0 or more")
