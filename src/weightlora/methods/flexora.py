"""Flexora (Wei et al. 2025, ACL): one number α_l for each block of layers, trained on rows that the adapters never see.

ΔW_l ← ŵ_l·s·B·A with ŵ = L·softmax(α), L blocks. A and B descend the training loss, α the validation loss; the blocks
whose α ends highest (in the paper: above 0) are adapted, afresh.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from weightlora.errors import OptionError, SelectionError
from weightlora.methods.base import ChoosingMethod, Method
from weightlora.model.gates import gated
from weightlora.model.sites import Site, adapter_parameters, find_sites
from weightlora.plan.budget import Budget, Keep, read_budget
from weightlora.plan.plan import AdapterPlan, base_model_name, make_plan
from weightlora.selection.batches import Loss, cycled
from weightlora.selection.stage import Stage, adapter_weights, let_train, probed

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn


def build(
    *,
    keep: Keep | None = 0.5,
    unit: Literal["block", "site"] = "block",
    steps: int | None = None,
    validation: int = 8,
    alpha_lr: float = 0.01,
    power: int = 1,
    lr: float = 1e-3,
    seed: int = 0,
    loss_fn: Loss | None = None,
) -> Method:
    """Return the method.

    Args:
        keep: As in :func:`weightlora.select`, spent on whole blocks by falling α; None is the paper: all with α > 0.
        unit: What has an α: a ``"block"``, as in the paper, or every ``"site"``.
        steps: Steps of A and B, each followed by one of α; None stands for a tenth of the training's, at least 20.
        validation: Batches held out for α; each of its steps takes all of them. The authors' code has 8 a step.
        alpha_lr: Adam's learning rate for α.
        power: ŵ^power scales the adapters: 1 is the paper, 3 what the authors' code amounts to.
        lr: AdamW's learning rate for A, B and a fresh head.
        seed: Decides A's random start and dropout.
        loss_fn: As in :func:`weightlora.select`.

    Raises:
        OptionError: An argument is out of its range.
    """
    for name, value in (("steps", 1 if steps is None else steps), ("validation", validation), ("power", power)):
        if value < 1:
            raise OptionError(f"{name}={value} is not allowed: give at least 1")
    if unit not in ("block", "site"):
        raise OptionError(f"unit={unit!r} is not allowed: give 'block' or 'site'")

    def choose(model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int) -> AdapterPlan:
        sites = find_sites(model, lora).sites
        units = [(site.block or site.name) if unit == "block" else site.name for site in sites]
        budget = read_budget(1.0 if keep is None else keep, adapter_parameters(sites, lora))
        count = max(20, math.ceil(total_steps / 10)) if steps is None else steps
        shown = _in_turns(batches, count, validation)
        total = count * (1 + validation)
        with probed(model, lora, sites, batches=shown, steps=total, seed=seed, loss_fn=loss_fn) as stage:
            history = _descend(stage, units, count, validation, alpha_lr, power, lr)
        alpha = history[-1]
        kept = _fill(sites, units, alpha, budget, positive=keep is None)
        if not kept:
            raise SelectionError(_nothing_kept(keep))
        return make_plan(
            sites,
            lora,
            kept,
            alpha,
            history=tuple(map(tuple, history)),
            rule="flexora",
            options={
                "keep": keep,
                "unit": unit,
                "steps": count,
                "validation": validation,
                "alpha_lr": alpha_lr,
                "power": power,
                "lr": lr,
            },
            seed=seed,
            base_model=base_model_name(model),
        )

    return ChoosingMethod(choose)


def unit_weights(alpha: Tensor) -> Tensor:
    """Return ŵ = L·softmax(α): all 1 at the start, adding up to L always.

    Example:
        >>> unit_weights(torch.zeros(4))
        tensor([1., 1., 1., 1.])
    """
    return len(alpha) * alpha.softmax(dim=0)


def alpha_gradient(weights: Tensor, gradient: Tensor, power: int) -> Tensor:
    """Return ∂L/∂α from the gradient g of the loss by the scales ŵ^power.

    ∂L/∂ŵ_l = power·ŵ_l^(power−1)·g_l and ∂L/∂α_k = ŵ_k·(∂L/∂ŵ_k − Σ_l ŵ_l·∂L/∂ŵ_l / L).

    Example:
        >>> alpha_gradient(torch.ones(2), torch.tensor([-1.0, 0.0]), power=1)
        tensor([-0.5000,  0.5000])
    """
    by_weight = power * weights ** (power - 1) * gradient
    return weights * (by_weight - (weights * by_weight).mean())


def _nothing_kept(keep: Keep | None) -> str:
    if keep is None:
        return "no block has an alpha above 0; raise steps, or give keep="
    return f"keep={keep!r} pays for no whole block; raise keep, or take unit='site'"


def _in_turns(batches: Iterable[Any], steps: int, validation: int) -> Iterator[Any]:
    """One batch to train on, then all that are held out, and again."""
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


def _descend(
    stage: Stage, units: Sequence[str], steps: int, validation: int, alpha_lr: float, power: int, lr: float
) -> list[list[float]]:
    """α of every site's unit after each step."""
    names = list(dict.fromkeys(units))
    place = torch.tensor([names.index(unit) for unit in units])
    alpha = torch.zeros(len(names), requires_grad=True)
    trained = [*adapter_weights(stage), *stage.head]
    let_train(stage, trained)
    optimizer, alpha_optimizer = torch.optim.AdamW(trained, lr=lr), torch.optim.Adam([alpha], lr=alpha_lr)
    history: list[list[float]] = []
    with gated(stage.layers) as gates:
        for step in range(1, steps + 1):
            weights = unit_weights(alpha.detach())
            gates.write((weights**power)[place])
            stage.backward("adapters", step, trained)
            optimizer.step()
            optimizer.zero_grad()
            stage.model.eval()
            for _ in range(validation):
                stage.backward("alpha", step, trained)
            stage.model.train()
            heard = torch.zeros(len(names)).index_add(0, place, gates.gradient / validation)
            optimizer.zero_grad()
            alpha.grad = alpha_gradient(weights, heard, power)
            alpha_optimizer.step()
            history.append(alpha.detach()[place].tolist())
    return history


def _fill(
    sites: Sequence[Site], units: Sequence[str], alpha: Sequence[float], budget: Budget, *, positive: bool
) -> list[str]:
    """Names of the sites of the units that the budget pays for, by falling α."""
    by_unit = dict(zip(units, alpha, strict=True))
    costs = dict.fromkeys(by_unit, 0)
    for unit, cost in zip(units, budget.costs, strict=True):
        costs[unit] += cost
    names = list(by_unit)
    chosen = Budget(tuple(costs.values()), budget.limit).choose(list(by_unit.values()))
    kept = {names[i] for i in chosen if not positive or by_unit[names[i]] > 0}
    return [site.name for site, unit in zip(sites, units, strict=True) if unit in kept]
