"""The protocol of all methods, and two ways to implement it: by a plan, or by other trained parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from weightlora.errors import PlanError
from weightlora.methods.common.export import Factors, become_stock, factors_plan
from weightlora.model.layers import adapter_layers, without_adapters
from weightlora.model.sites import Site, require_uniform
from weightlora.plan.make import make_plan
from weightlora.plan.plan import AdapterPlan
from weightlora.plan.provenance import base_model_name

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import nn
    from transformers import TrainerCallback


class Method(Protocol):
    """A way to spend a LoRA budget; whatever it trains, it ends in a stock PEFT checkpoint.

    Callers read what kind of method it is off its line in :data:`weightlora.METHODS`, never off its class.
    """

    @property
    def plan(self) -> AdapterPlan:
        """The plan in force, after :meth:`attach`. Where ranks move during training, the plan changes with them.

        Raises:
            PlanError: :meth:`attach` has not run.
        """
        ...

    def budget(self, step: int) -> int:
        """Ranks, summed over the sites, that the method may hold after optimizer step ``step`` (0: before training)."""
        ...

    def attach(self, model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int) -> PeftModel:
        """Before training: put adapters into ``model``.

        Args:
            model: The base model. Methods that train plain LoRA also take a PEFT model, whose adapters are taken off.
            lora: Plain LoRA on all candidates: the budget.
            batches: Training batches, for methods that read them.
            total_steps: Optimizer steps that the training will take.
        """
        ...

    def callbacks(self) -> list[TrainerCallback]:
        """During training: what changes ranks or gradients; empty for methods that choose before."""
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
"""``choose(model, lora, batches, total_steps)``: makes the plan of a choosing method."""


class AttachedPlan:
    """Descriptor of a method's plan: an error until ``attach`` has set it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._key = f"{name} of {owner.__name__}"

    def __get__(self, method: object, _owner: type) -> AdapterPlan:
        if self._key not in vars(method):
            raise PlanError("the method has no plan yet; call attach() or weightlora.method_for(trainer, ...) first")
        return vars(method)[self._key]

    def __set__(self, method: object, plan: AdapterPlan) -> None:
        vars(method)[self._key] = plan


class ChoosingMethod:
    """A :class:`Method` that does all its work in ``attach``: it makes a plan.

    Args:
        choose: Makes the plan; the model is left as it was.
    """

    _plan = AttachedPlan()

    def __init__(self, choose: Choose) -> None:
        self.choose = choose

    @property
    def plan(self) -> AdapterPlan:
        """The plan that :meth:`attach` made."""
        return self._plan

    def attach(self, model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int) -> PeftModel:
        """Choose, then put stock adapters on the planned sites."""
        made = self.choose(model, lora, batches, total_steps)
        self._plan = made.plan if isinstance(made, Prepared) else made
        self._plan.check_sites(model)  # before its adapters are taken off
        attached = self._plan.attach(without_adapters(model))
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


Attach = Callable[["nn.Module", "LoraConfig"], tuple[AdapterPlan, "PeftModel"]]
"""``attach(model, lora)``: puts the trained parameters on the sites; returns the plan as stock LoRA, and the model."""


class ExpandedMethod:
    """A :class:`Method` that trains other parameters than A and B and computes A and B from them at the end.

    No rank changes during training, and whatever is trained or frozen is in PEFT's own checkpoint.

    Args:
        attach: Puts the adapters on the sites.
        factors: Computes A and B of one layer.
    """

    _plan = AttachedPlan()

    def __init__(self, attach: Attach, factors: Callable[[Any], Factors]) -> None:
        self._attach, self._factors = attach, factors

    @property
    def plan(self) -> AdapterPlan:
        """The ranks of the stock LoRA that :meth:`export` makes."""
        return self._plan

    def budget(self, step: int) -> int:  # noqa: ARG002 - the same at every step
        """Plain LoRA's ranks, or as many as were asked for."""
        return self._budget

    def attach(self, model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int) -> PeftModel:  # noqa: ARG002
        """Put what is trained on all sites."""
        self._plan, attached = self._attach(model, lora)
        self._budget = max(sum(entry.lora_r for entry in self._plan.entries), sum(self._plan.ranks.values()))
        return attached

    def callbacks(self) -> list[TrainerCallback]:
        """Nothing moves during training."""
        return []

    @torch.no_grad()
    def export(self, model: PeftModel) -> PeftModel:
        """Return stock LoRA of the factors."""
        factors = {name: self._factors(layer) for name, layer in adapter_layers(model).items()}
        self._plan = factors_plan(self._plan, factors)
        return become_stock(model, self._plan, factors)


def uniform_plan(
    model: nn.Module, lora: LoraConfig, sites: Sequence[Site], *, r: int, alpha: float, **record: Any
) -> AdapterPlan:
    """The plan of rank ``r`` and strength alpha/r on all of ``sites``, whatever the budget ``lora`` has.

    Args:
        model: The base model.
        lora: The budget, the same on every site.
        sites: All candidates.
        r: The rank as stock LoRA.
        alpha: ``lora_alpha`` as stock LoRA.
        record: Further fields of the plan: rule and options.

    Raises:
        OptionError: ``lora`` treats sites differently.
    """
    require_uniform(record["rule"], lora)
    plan = make_plan(sites, lora, [site.name for site in sites], base_model=base_model_name(model), **record)
    return replace(plan, entries=tuple(replace(entry, r=r, alpha=alpha) for entry in plan.entries))


def with_question(method: ChoosingMethod, question: Mapping[str, Any]) -> Method:
    """Return the method whose plan records what was asked; see :attr:`AdapterPlan.question`."""

    def choose(model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int) -> AdapterPlan | Prepared:
        made = method.choose(model, lora, batches, total_steps)
        if isinstance(made, Prepared):
            return replace(made, plan=replace(made.plan, question=question))
        return replace(made, question=question)

    return ChoosingMethod(choose)


def planned_method(plan: AdapterPlan, prepare: Callable[[PeftModel], None] | None = None) -> Method:
    """Return the method that trains stock LoRA on a plan that was made before.

    Args:
        plan: Where adapters go.
        prepare: As in :class:`Prepared`; None leaves the adapters as they are initialised.
    """
    made = plan if prepare is None else Prepared(plan, prepare)

    def choose(*_: object) -> AdapterPlan | Prepared:
        return made

    return ChoosingMethod(choose)
