"""What a selection is asked for: one object from ``select``, a method, a recipe or a trainer to the selection."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from weightlora.errors import OptionError
from weightlora.plan.budget import Ranking
from weightlora.plan.limits import Limits
from weightlora.selection.rules import require_training_rule, rule_of
from weightlora.selection.steps import Steps, check_steps
from weightlora.validation import Natural, Positive, check_fields

if TYPE_CHECKING:
    from peft import LoraConfig

    from weightlora.fast.step import Dropout
    from weightlora.selection.batches import Loss
    from weightlora.selection.rules.base import Rule
    from weightlora.selection.stage import MakeStep

F = TypeVar("F", bound=Callable[..., Any])
#: The rule where none is named and sites have to be chosen.
DEFAULT_RULE = "first_order"
#: Selecting a floor takes three steps at least, and at most this share of the time that is left to the run.
_FLOOR_STEPS, _FLOOR_SHARE = 3, 0.15


@dataclass(frozen=True, kw_only=True)
class Scoring(Limits):
    """The arguments of a selection, checked; :func:`weightlora.select` says what they mean.

    Raises:
        OptionError: One of them has a type or a value that it cannot have.

    Example:
        >>> Scoring(adapters=18).asked, Scoring(parameters=0.1).scored_by
        ({'adapters': 18}, None)
    """

    lora: LoraConfig | None = None
    rule: str | Rule | None = None
    steps: Steps | None = None
    total_steps: Natural | None = None
    learning_rate: Positive = 1e-3
    head_learning_rate: Positive | None = None
    seed: int = 0
    epochs: Positive | None = None
    """Of a training that stores what is frozen: ``time`` is then the share of the whole run. None: without a store."""
    ranking: Ranking | None = None
    loss_fn: Loss | None = None
    fast: Dropout | None = None
    progress: bool = True
    warm_start: bool = False
    """Whether the weights that the scoring trained are wanted, too."""
    run: MakeStep | None = None
    """The optimizer of the training that the scoring begins: the head and its optimizer state are wanted, too."""

    def __post_init__(self) -> None:
        from weightlora.selection.rules.base import require

        super().__post_init__()
        check_fields(self)
        rule, fast, loss_fn = self.scored_by, self.fast, self.loss_fn
        if self.steps is not None:
            check_steps(self.steps)
        require(fast in (None, "input", "rank"), f"fast={fast!r}", "'input', 'rank' or None")
        require(loss_fn is None or callable(loss_fn), f"loss_fn={loss_fn!r:.80}", "a function, or None")
        if self.ranking == "spread" and self.are_measured:
            raise OptionError(
                f"ranking='spread' does not go with {self.text}, whose sites are chosen by scores and measured costs; "
                "leave ranking out"
            )
        for name in ("steps", "ranking") if rule is None else ():
            require(
                getattr(self, name) is None,
                f"{name}={getattr(self, name)!r} with {self.text} alone, for which nothing is scored,",
                "a rule, too, or leave it out",
            )
        if self.warm_start and rule is None:
            raise OptionError(f"warm_start=True: with {self.text} alone nothing is scored or trained; name a rule")
        if self.warm_start and rule is not None:
            require_training_rule(rule)

    @cached_property
    def scored_by(self) -> Rule | None:
        """The rule as an object; None where ranks and steps are free and no rule is named: then nothing is scored."""
        if self.rule is not None:
            return rule_of(self.rule)
        free = bool(self.asked) and {*self.asked} <= {"parameters", "time"}
        return None if free and not (self.frees_steps and self._is_long_enough) else rule_of(DEFAULT_RULE)

    @property
    def frees_steps(self) -> bool:
        """Whether a run with a store may take fewer steps, so that they compete with a higher floor."""
        alone = self.rule is None and self.time is not None and {*self.asked} <= {"parameters", "time"}
        return alone and self.epochs is not None

    @property
    def frees_rows(self) -> bool:
        """Whether fewer rows at once may take the place of fewer sites: nothing says that sites are to be chosen."""
        unscored = self.rule is None and self.steps is None and self.ranking is None and not self.warm_start
        return unscored and self.memory is not None and {*self.asked} <= {"memory", "parameters"}

    @property
    def _is_long_enough(self) -> bool:
        """Whether the time of a run leaves any for the selection of a floor."""
        total = self.total_steps if self.steps is None else None
        return total is None or self.time is None or _FLOOR_SHARE * self.time * total >= _FLOOR_STEPS

    @property
    def ranked_by(self) -> Ranking:
        """How sites compete: as was asked for, else as the rule and the limits want it."""
        if self.ranking is not None:
            return self.ranking
        rule = self.scored_by
        return "score" if self.are_measured or rule is None else rule.ranking


#: Those that a method takes when it is made; the others are known when it is attached.
OPTIONS = tuple(f.name for f in fields(Scoring) if f.name not in ("lora", "total_steps", "warm_start", "run"))


def takes(names: Sequence[str]) -> Callable[[F], F]:
    """Return a decorator for a function of ``**options``: it shows these options of a scoring, with their defaults.

    Example:
        >>> @takes(["time", "seed"])
        ... def build(**options):
        ...     return Scoring(**options)
        >>> inspect.signature(build)
        <Signature (*, time: 'float | None' = None, seed: 'int' = 0)>
    """
    known = inspect.signature(Scoring).parameters

    def shown(function: F) -> F:
        vars(function)["__signature__"] = inspect.Signature([known[name] for name in names])
        return function

    return shown
