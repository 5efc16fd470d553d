"""What a warm-up is asked for: one object from ``select``, a method, a recipe or a trainer to the selection itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from weightlora.plan.budget import Keep, check_keep
from weightlora.plan.ranking import Ranking, ranking_of
from weightlora.selection.rules import require_training_rule, rule_of
from weightlora.selection.steps import Steps, check_steps, warmup_steps
from weightlora.validation import Natural, Positive, check_fields

if TYPE_CHECKING:
    from peft import LoraConfig

    from weightlora.fast.dropout import Dropout
    from weightlora.selection.batches import Loss
    from weightlora.selection.rules.base import Rule

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Warmup:
    """The arguments of a selection, checked; :func:`weightlora.select` says what they mean.

    Raises:
        OptionError: One of them has a type or a value that it cannot have.

    Example:
        >>> Warmup(total_steps=10_000).t, Warmup(rule="pursuit").t
        (50, 100)
    """

    lora: LoraConfig | None = None
    keep: Keep = 0.5
    rule: str | Rule = "first_order"
    steps: Steps | None = None
    total_steps: Natural | None = None
    lr: Positive = 1e-3
    head_lr: Positive | None = None
    seed: int = 0
    ranking: Ranking | None = None
    loss_fn: Loss | None = None
    fast: Dropout | None = None
    progress: bool = True
    warm_start: bool = False
    """Whether the weights that the warm-up trained are wanted, too."""

    def __post_init__(self) -> None:
        from weightlora.selection.rules.base import require

        check_keep(self.keep)
        check_fields(self)
        rule, fast, loss_fn = self.scored_by, self.fast, self.loss_fn
        if self.steps is not None:
            check_steps(self.steps)
        require(fast in (None, "input", "rank"), f"fast={fast!r}", "'input', 'rank' or None")
        require(loss_fn is None or callable(loss_fn), f"loss_fn={loss_fn!r:.80}", "a function, or None")
        if self.warm_start:
            require_training_rule(rule)

    @cached_property
    def scored_by(self) -> Rule:
        """The rule as an object."""
        return rule_of(self.rule)

    @property
    def t(self) -> Steps:
        """T, or ``"auto"``: the steps that were asked for, else those of the rule and the training."""
        return warmup_steps(self.total_steps, self.scored_by.least_steps) if self.steps is None else self.steps

    @property
    def ranked_by(self) -> Ranking:
        """How sites compete: as was asked for, else as the rule and the budget want it."""
        return ranking_of(self.ranking, self.keep, self.scored_by.ranking)


#: Those that a method takes when it is made; the others are known when it is attached.
OPTIONS = tuple(f.name for f in fields(Warmup) if f.name not in ("lora", "total_steps", "warm_start"))


def takes(names: Sequence[str]) -> Callable[[F], F]:
    """Return a decorator for a function of ``**options``: it shows these options of a warm-up, with their defaults.

    Example:
        >>> @takes(["keep", "seed"])
        ... def build(**options):
        ...     return Warmup(**options)
        >>> inspect.signature(build)
        <Signature (*, keep: 'Keep' = 0.5, seed: 'int' = 0)>
    """
    known = inspect.signature(Warmup).parameters

    def shown(function: F) -> F:
        vars(function)["__signature__"] = inspect.Signature([known[name] for name in names])
        return function

    return shown
