"""Flexora (Wei et al. 2025, ACL): scores each block of layers by a weight α_l that is trained on held-out rows.

ΔW_l ← ŵ_l·s·B·A with ŵ = L·softmax(α), L blocks. A and B descend the training loss, α the validation loss. The blocks
with the highest α at the end (in the paper: above 0) get new adapters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from weightlora.errors import SelectionError
from weightlora.methods.base import PlanningMethod, plan_of, recorded
from weightlora.model.gates import gated
from weightlora.model.restore import evaluated
from weightlora.model.sites import Site, find_sites
from weightlora.plan.budget import Budget
from weightlora.plan.limits import Limits
from weightlora.plan.plan import AdapterPlan
from weightlora.selection.allocate import site_budget
from weightlora.selection.batches import Loss, cycled
from weightlora.selection.stage import Stage, adapter_weights, let_train, probed
from weightlora.validation import Count, Positive

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn


@dataclass(kw_only=True, eq=False)
class Flexora(PlanningMethod):
    """Flexora.

    Args:
        adapters: At most so many adapters, or this share of them, in whole blocks by falling α. None without
            ``parameters`` is the paper: all with α > 0.
        parameters: At most so many parameters of whole adapters, or this share of LoRA's, instead of ``adapters``.
        unit: What has an α: a ``"block"``, as in the paper, or every ``"site"``.
        steps: Steps of A and B, each followed by one of α. None: a tenth of the training's steps, at least 20.
        validation: Batches held out for α; each step of α uses all of them. The authors' code uses 8 in a step.
        alpha_lr: Adam's learning rate for α.
        power: ŵ^power scales the adapters: 1 is the paper, 3 the effect of the authors' code.
        learning_rate: AdamW's learning rate for A, B and a new task head.
        head_learning_rate: That of the new head, if another.
        seed: Decides A's random start and dropout.
        loss_fn: As in :func:`weightlora.select`.
    """

    adapters: float | None = 0.5
    parameters: float | None = None
    unit: Literal["block", "site"] = "block"
    steps: Count | None = None
    validation: Count = 8
    alpha_lr: Positive = 0.01
    power: Count = 1
    learning_rate: Positive = 1e-3
    head_learning_rate: Positive | None = None
    seed: int = 0
    loss_fn: Loss | None = None

    def choose(self, model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int, /) -> AdapterPlan:
        """Keep the units with the highest α."""
        found = find_sites(model, lora)
        sites = found.sites
        units = [(site.block or site.name) if self.unit == "block" else site.name for site in sites]
        is_paper = self.adapters is None and self.parameters is None
        adapters = None if self.parameters is not None else len(sites) if is_paper else self.adapters
        limits = Limits(adapters=adapters, parameters=self.parameters)
        budget = site_budget(sites, lora, limits)
        steps = max(20, math.ceil(total_steps / 10)) if self.steps is None else self.steps
        used, total = _interleaved(batches, steps, self.validation), steps * (1 + self.validation)
        given: dict[str, Any] = {
            "seed": self.seed,
            "loss_fn": self.loss_fn,
            "head_learning_rate": self.head_learning_rate,
        }
        with probed(model, lora, sites, batches=used, steps=total, **given) as stage:
            history = self._descend(stage, units, steps)
        alpha = history[-1]
        kept = _fill(sites, units, alpha, budget, positive=is_paper)
        if not kept:
            none = f"no whole block fits {limits.text}; raise it, or take unit='site'"
            raise SelectionError("no block has an alpha above 0; raise steps, or give adapters=" if is_paper else none)
        record = {"rule": "flexora", "options": recorded(self, steps=steps), "seed": self.seed}
        return plan_of(model, lora, found, kept, alpha, history=tuple(map(tuple, history)), **record)

    def _descend(self, stage: Stage, units: Sequence[str], steps: int) -> list[list[float]]:
        """Train adapters and α, and return α of every site's unit after each step."""
        names = list(dict.fromkeys(units))
        place = torch.tensor([names.index(unit) for unit in units])
        alpha = torch.zeros(len(names), requires_grad=True)
        adapters = adapter_weights(stage)
        trained = [*adapters, *stage.head]
        let_train(stage, trained)
        optimizer = stage.optimizer(adapters, self.learning_rate)
        alpha_optimizer = torch.optim.Adam([alpha], lr=self.alpha_lr)
        history: list[list[float]] = []
        with gated(stage.layers) as gates:
            for step in range(1, steps + 1):
                weights = unit_weights(alpha.detach())
                gates.write((weights**self.power)[place])
                stage.backward("adapters", step, trained)
                optimizer.step()
                optimizer.zero_grad()
                with evaluated(stage.model):
                    for _ in range(self.validation):
                        stage.backward("alpha", step, trained)
                gradient = torch.zeros(len(names)).index_add(0, place, gates.gradient / self.validation)
                optimizer.zero_grad()
                alpha.grad = alpha_gradient(weights, gradient, self.power)
                alpha_optimizer.step()
                history.append(alpha.detach()[place].tolist())
        return history


build = Flexora


def unit_weights(alpha: Tensor) -> Tensor:
    """Return ŵ = L·softmax(α): all 1 at the start, always with the sum L.

    Example:
        >>> unit_weights(torch.zeros(4))
        tensor([1., 1., 1., 1.])
    """
    return len(alpha) * alpha.softmax(dim=0)


def alpha_gradient(weights: Tensor, gradient: Tensor, power: int) -> Tensor:
    """Return ∂L/∂α, given the gradient g of the loss with respect to the scales ŵ^power.

    ∂L/∂ŵ_l = power·ŵ_l^(power−1)·g_l and ∂L/∂α_k = ŵ_k·(∂L/∂ŵ_k − Σ_l ŵ_l·∂L/∂ŵ_l / L).

    Example:
        >>> alpha_gradient(torch.ones(2), torch.tensor([-1.0, 0.0]), power=1)
        tensor([-0.5000,  0.5000])
    """
    by_weight = power * weights ** (power - 1) * gradient
    return weights * (by_weight - (weights * by_weight).mean())


def _interleaved(batches: Iterable[Any], steps: int, validation: int) -> Iterator[Any]:
    """Yield one batch to train on, then all held-out ones, and so on."""
    drawn = list(itertools.islice(batches, validation + steps))
    held_out, rest = drawn[:validation], drawn[validation:]
    if not rest:
        raise SelectionError(
            f"{len(drawn)} batches, of which {validation} are held out for alpha, leave none to train on; give more "
            "batches or lower validation"
        )
    for batch in cycled(rest, steps):
        yield batch
        yield from held_out


def _fill(
    sites: Sequence[Site], units: Sequence[str], alpha: Sequence[float], budget: Budget, *, positive: bool
) -> list[str]:
    """Return the names of the sites whose units fit the budget, by falling α."""
    by_unit = dict(zip(units, alpha, strict=True))
    costs = dict.fromkeys(by_unit, 0)
    for unit, cost in zip(units, budget.costs, strict=True):
        costs[unit] += cost
    names = list(by_unit)
    chosen = Budget(tuple(costs.values()), budget.limit).choose(list(by_unit.values()))
    kept = {names[i] for i in chosen if not positive or by_unit[names[i]] > 0}
    return [site.name for site, unit in zip(sites, units, strict=True) if unit in kept]
