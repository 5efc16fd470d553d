"""The one protocol of all methods, and the shape of those whose whole work is a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from weightlora.plan import AdapterPlan

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import nn
    from transformers import TrainerCallback


class Method(Protocol):
    """A way to spend a LoRA budget; whatever it does, it ends in a stock PEFT checkpoint.

    Nothing above the registry knows whether a method chooses before training or moves ranks during it.
    """

    @property
    def plan(self) -> AdapterPlan:
        """The plan in force; known once :meth:`attach` has run. Where ranks move, it moves with them."""
        ...

    def budget(self, step: int) -> int:
        """Ranks, summed over the sites, that the method may hold after optimizer step ``step`` (0: before training)."""
        ...

    def attach(self, model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int) -> PeftModel:
        """Before training: put adapters into ``model``.

        Args:
            model: The base model.
            lora: Plain LoRA on all candidates: the budget.
            batches: Training batches to look at.
            total_steps: Optimizer steps that the training will take.
        """
        ...

    def callbacks(self) -> list[TrainerCallback]:
        """During training: what moves ranks; empty for methods that choose beforehand."""
        ...

    def export(self, model: PeftModel) -> PeftModel:
        """After training: return stock LoRA with the same logits."""
        ...


@dataclass(frozen=True)
class Prepared:
    """A plan whose adapters do not start as plain LoRA's do."""

    plan: AdapterPlan
    prepare: Callable[[PeftModel], None]
    """Called with the planned, freshly initialised adapters before they are trained."""


Choose = Callable[["nn.Module", "LoraConfig", Iterable[Any], int], AdapterPlan | Prepared]
"""``choose(model, lora, batches, total_steps)``: what a choosing method has to say."""


class ChoosingMethod:
    """A :class:`Method` that does all its work in ``attach``: it makes a plan.

    Args:
        choose: Makes the plan; the model is left as it was.
    """

    def __init__(self, choose: Choose) -> None:
        self._choose = choose
        self._plan: AdapterPlan | None = None

    @property
    def plan(self) -> AdapterPlan:
        """The plan that :meth:`attach` made."""
        assert self._plan is not None, "attach() comes first"
        return self._plan

    def attach(self, model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int) -> PeftModel:
        """Choose, then put stock adapters on the planned sites."""
        made = self._choose(model, lora, batches, total_steps)
        self._plan = made.plan if isinstance(made, Prepared) else made
        attached = self._plan.attach(model)
        if isinstance(made, Prepared):
            made.prepare(attached)
        return attached

    def budget(self, step: int) -> int:  # noqa: ARG002 - the same at every step
        """Plain LoRA's ranks: what was to be spent."""
        return sum(entry.lora_r for entry in self.plan.entries)

    def callbacks(self) -> list[TrainerCallback]:
        """Nothing moves during training."""
        return []

    def export(self, model: PeftModel) -> PeftModel:
        """The model is stock LoRA already; checked against the plan once more."""
        self.plan.check(model)
        return model
