"""Methods whose plan is a selection's: the project's own, and the paper's two, whose selection begins the training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from weightlora.errors import OptionError
from weightlora.fast.step import Dropout
from weightlora.methods.base import PlanningMethod, PreparedPlan
from weightlora.plan.plan import AdapterPlan
from weightlora.selection.batches import Loss
from weightlora.selection.rules.paper import StoIHT
from weightlora.selection.scoring import Scoring
from weightlora.selection.select import selected
from weightlora.selection.stage import MakeStep
from weightlora.selection.steps import scoring_steps
from weightlora.validation import Natural, Positive

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn


class SelectingMethod(PlanningMethod):
    """The adapters that :func:`weightlora.select` plans.

    Args:
        scoring: What is asked for.
    """

    def __init__(self, scoring: Scoring) -> None:
        self.scoring = scoring

    def choose(
        self, model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int, /
    ) -> AdapterPlan | PreparedPlan:
        """Select; with ``warm_start`` the adapters start from the scoring's weights."""
        trained = selected(model, batches, replace(self.scoring, lora=lora, total_steps=total_steps))
        return PreparedPlan(trained.plan, trained.copy_into) if self.scoring.warm_start else trained.plan


@dataclass(kw_only=True, eq=False)
class GatedMethod(SelectingMethod):
    """The paper's methods (section 2).

    The first T steps of the training have a gate on each adapter. They use the training's optimizer, schedule and
    batches. The head goes on from there; the kept adapters are initialised again, with a fresh optimizer state.

    Args:
        adapters: The paper's K: so many adapters, or this share of them; half of them by default.
        steps: T; None takes 0.5 % of the training's steps, at least 2.
        gate_lr: η, as in :class:`weightlora.selection.rules.paper.StoIHT`.
        order: ``"alternating"`` (the paper) or ``"joint"`` (the authors' code).
        threshold_every: Steps between thresholds; 1 is Appendix B.
        seed: Decides A's random start and dropout.
        learning_rate: AdamW's, constant, where the method is attached without a trainer; a trainer gives its own
            optimizer and schedule.
        loss_fn: As in :func:`weightlora.select`.
        fast: As in :func:`weightlora.select`.
        progress: Show a bar where the output is a terminal.
        run: The trainer's optimizer. Without it the T steps are no part of the training.

    Raises:
        OptionError: A value is out of its range, or T leaves no step of the training.
    """

    adapters: float | None = None
    steps: Natural | None = None
    gate_lr: float = StoIHT.gate_lr
    order: Literal["alternating", "joint"] = StoIHT.order
    threshold_every: int = StoIHT.threshold_every
    seed: int = 0
    learning_rate: Positive = Scoring.learning_rate
    loss_fn: Loss | None = None
    fast: Dropout | None = None
    progress: bool = True
    run: MakeStep | None = None

    def __post_init__(self) -> None:
        rule = StoIHT(gate_lr=self.gate_lr, order=self.order, threshold_every=self.threshold_every)
        same = {f.name: getattr(self, f.name) for f in fields(GatedMethod) if f.name in Scoring.__dataclass_fields__}
        super().__init__(Scoring(rule=rule, **same))

    def choose(
        self, model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int, /
    ) -> AdapterPlan | PreparedPlan:
        """Take the first T steps with a gate on each adapter, and keep the K largest."""
        steps = scoring_steps(total_steps, StoIHT.least_steps) if self.steps is None else self.steps
        if self.run is not None and steps >= total_steps:
            raise OptionError(
                f"steps={steps} leaves none of the {total_steps} steps of the training for the kept adapters; lower "
                "steps, or train longer"
            )
        trained = selected(model, batches, replace(self.scoring, lora=lora, total_steps=total_steps))
        trained = replace(trained, plan=self.grown(trained.plan))
        return trained.plan if trained.begun is None else PreparedPlan(trained.plan, trained.copy_into, trained.begun)

    def grown(self, plan: AdapterPlan) -> AdapterPlan:
        """Return the plan at the ranks that are trained."""
        return plan
