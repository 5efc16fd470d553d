"""The protocol of all methods, and two ways to implement it: by a plan, or by other trained parameters.

The third, for methods that act while they train, is ``common/moving.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from weightlora.errors import PlanError
from weightlora.methods.families.export import Factors, become_stock, factors_plan, layer_factors
from weightlora.model.layers import adapter_layers, lora_layers, without_adapters
from weightlora.model.sites import Candidates, Site, find_sites, require_uniform
from weightlora.plan.card import base_model_name
from weightlora.plan.plan import AdapterPlan, make_plan

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import nn
    from transformers import TrainerCallback

    from weightlora.selection.trained import Begun


class Method(Protocol):
    """A way to spend a LoRA budget; whatever it trains, it ends in a stock PEFT checkpoint.

    Callers read what kind of method it is off its line in :data:`weightlora.methods.METHODS`, never off its class.
    """

    @property
    def plan(self) -> AdapterPlan:
        """The plan in force, after :meth:`attach`. Where ranks move during training, the plan changes with them.

        Raises:
            PlanError: :meth:`attach` has not run.
        """
        ...

    @property
    def begun(self) -> Begun | None:
        """The steps that :meth:`attach` took of the training, which goes on after them; None: none."""
        ...

    def most_ranks(self, step: int) -> int:
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
class PreparedPlan:
    """A plan whose adapters do not start as plain LoRA's do."""

    plan: AdapterPlan
    prepare: Callable[[PeftModel], None]
    """Called with the planned, freshly initialised adapters before they are trained."""
    begun: Begun | None = None
    """The steps of the training that were taken already."""


Choose = Callable[["nn.Module", "LoraConfig", Iterable[Any], int], AdapterPlan | PreparedPlan]
"""``choose(model, lora, batches, total_steps)``: makes the plan of a choosing method."""


class MethodBase:
    """What the kinds of methods share: a plan, which is an error until ``attach`` has set it."""

    begun: Begun | None = None
    """The steps that :meth:`attach` took of the training; None: none."""
    _attached: AdapterPlan | None = None

    @property
    def _plan(self) -> AdapterPlan:
        if self._attached is None:
            raise PlanError("the method has no plan yet; call attach() or weightlora.method_for(trainer, ...) first")
        return self._attached

    @_plan.setter
    def _plan(self, plan: AdapterPlan) -> None:
        self._attached = plan

    @property
    def plan(self) -> AdapterPlan:
        """The plan that ``attach`` made, and ``export`` of a method that trains other parameters."""
        return self._plan

    def most_ranks(self, step: int) -> int:  # noqa: ARG002 - the same at every step
        """Plain LoRA's ranks: what was to be spent."""
        return sum(entry.lora_r for entry in self._plan.entries)

    def callbacks(self) -> list[TrainerCallback]:
        """Nothing moves during training."""
        return []


@dataclass(frozen=True)
class Start:
    """Where adapters are put: a base model, plain LoRA on its sites, and the training batches."""

    model: nn.Module
    lora: LoraConfig
    sites: Sequence[Site]
    batches: Iterable[Any]


class PlanningMethod(MethodBase):
    """A :class:`Method` that does all its work in ``attach``: it makes a plan.

    A method is a dataclass of its options that derives from this and writes :meth:`choose`.
    """

    def choose(
        self, model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int, /
    ) -> AdapterPlan | PreparedPlan:
        """Make the plan; the model is left as it was."""
        raise NotImplementedError

    def attach(self, model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int) -> PeftModel:
        """Choose, then put stock adapters on the planned sites."""
        made = self.choose(model, lora, batches, total_steps)
        self._plan = made.plan if isinstance(made, PreparedPlan) else made
        self.begun = made.begun if isinstance(made, PreparedPlan) else None
        self._plan.check_sites(model)  # before its adapters are taken off
        attached = self._plan.attach(without_adapters(model))
        if isinstance(made, PreparedPlan):
            made.prepare(attached)
        return attached

    def export(self, model: PeftModel) -> PeftModel:
        """The model is stock LoRA already; checked against the plan once more."""
        self._plan.check(model)
        return model


class ChoosingMethod(PlanningMethod):
    """The method whose plan a function makes.

    Args:
        choose: See :meth:`PlanningMethod.choose`.
    """

    def __init__(self, choose: Choose) -> None:
        self._choose = choose

    def choose(
        self, model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int, /
    ) -> AdapterPlan | PreparedPlan:
        """Call the function."""
        return self._choose(model, lora, batches, total_steps)


class ExpandedMethod(MethodBase):
    """A :class:`Method` that trains other parameters than A and B and computes A and B from them at the end.

    No rank changes during training, and whatever is trained or frozen is in PEFT's own checkpoint. A method is a
    dataclass of its options that derives from this.
    """

    def _planned(self, start: Start) -> AdapterPlan:
        """Return the ranks of the stock LoRA at the end, and the options as they are used."""
        raise NotImplementedError

    def _put(self, start: Start) -> PeftModel:
        """Put what is trained on the sites, by default stock LoRA that :meth:`_change` changes."""
        attached = self._plan.attach(start.model)
        self._change(lora_layers(attached))
        return attached

    def _change(self, layers: Mapping[str, Any]) -> None:
        """Put what is trained in the place of A and B of the layers."""
        raise NotImplementedError

    def _factors(self, layer: Any) -> Factors:
        """Return A and B of a layer at the end."""
        return layer_factors(layer)

    def most_ranks(self, step: int) -> int:
        """Plain LoRA's ranks, or as many as were asked for."""
        return max(super().most_ranks(step), sum(self._plan.ranks.values()))

    def attach(self, model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int) -> PeftModel:  # noqa: ARG002
        """Put what is trained on all sites."""
        start = Start(model, lora, find_sites(model, lora).sites, batches)
        self._plan = self._planned(start)
        return self._put(start)

    @torch.no_grad()
    def export(self, model: PeftModel) -> PeftModel:
        """Return stock LoRA of the factors."""
        factors = {name: self._factors(layer) for name, layer in adapter_layers(model).items()}
        self._plan = factors_plan(self._plan, factors)
        return become_stock(model, self._plan, factors)


def plan_of(
    model: nn.Module,
    lora: LoraConfig,
    found: Candidates,
    kept: Sequence[str] | None = None,
    scores: Sequence[float] | None = None,
    **record: Any,
) -> AdapterPlan:
    """Return the plan of stock LoRA on the candidates ``kept``, and on the parameters that ``lora`` names.

    Args:
        model: The base model.
        lora: The budget.
        found: All candidates.
        kept: Names of the sites that carry an adapter; None: of all.
        scores: One for each candidate.
        record: Further fields of the plan: rule, options, seed, history.
    """
    names = [site.name for site in found.sites] if kept is None else kept
    record = {"target_parameters": found.parameters, "base_model": base_model_name(model), **record}
    return make_plan(found.sites, lora, names, scores, **record)


def recorded(method: Any, **settled: Any) -> dict[str, Any]:
    """Return a method's options for its plan, without seed and loss; ``settled`` are those that were None."""
    own = {field.name: getattr(method, field.name) for field in fields(method)}
    return {name: value for name, value in (own | settled).items() if name not in ("seed", "loss_fn")}


def uniform_plan(start: Start, *, r: int, alpha: float, **record: Any) -> AdapterPlan:
    """Return the plan of rank ``r`` and strength alpha/r on all sites, whatever the budget.

    Args:
        start: The base model, and the budget, the same on every site.
        r: The rank as stock LoRA.
        alpha: ``lora_alpha`` as stock LoRA.
        record: Further fields of the plan: rule and options.

    Raises:
        OptionError: The budget differs between sites.
    """
    require_uniform(record["rule"], start.lora)
    names = [site.name for site in start.sites]
    plan = make_plan(start.sites, start.lora, names, base_model=base_model_name(start.model), **record)
    return replace(plan, entries=tuple(replace(entry, r=r, alpha=alpha) for entry in plan.entries))


def with_question(method: PlanningMethod, question: Mapping[str, Any]) -> Method:
    """Return the method whose plan records what was asked; see :attr:`AdapterPlan.question`."""

    def choose(
        model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int
    ) -> AdapterPlan | PreparedPlan:
        made = method.choose(model, lora, batches, total_steps)
        if isinstance(made, PreparedPlan):
            return replace(made, plan=replace(made.plan, question=question))
        return replace(made, question=question)

    return ChoosingMethod(choose)


def planned_method(plan: AdapterPlan, prepare: Callable[[PeftModel], None] | None = None) -> Method:
    """Return the method that trains stock LoRA on a plan that was made before.

    Args:
        plan: Where adapters go.
        prepare: As in :class:`PreparedPlan`; None leaves the adapters as they are initialised.
    """
    made = plan if prepare is None else PreparedPlan(plan, prepare)

    def choose(*_: object) -> AdapterPlan | PreparedPlan:
        return made

    return ChoosingMethod(choose)
