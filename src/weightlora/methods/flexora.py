"""Flexora (Wei et al. 2025, ACL): scores each block of layers by a weight α_l that is trained on held-out rows.

ΔW_l ← ŵ_l·s·B·A with ŵ = L·softmax(α), L blocks. A and B descend the training loss, α the validation loss. The blocks
with the highest α at the end (in the paper: above 0) get new adapters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from weightlora.errors import OptionError, SelectionError
from weightlora.methods.base import ChoosingMethod, Method
from weightlora.model.gates import gated
from weightlora.model.sites import Site, adapter_parameters, find_sites
from weightlora.plan.budget import Budget, Keep, read_budget
from weightlora.plan.make import make_plan
from weightlora.plan.plan import AdapterPlan
from weightlora.plan.provenance import base_model_name
from weightlora.selection.batches import Loss, cycled
from weightlora.selection.stage import Stage, adapter_weights, evaluated, let_train, probed

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn


@dataclass(frozen=True)
class _Options:
    keep: Keep | None
    unit: Literal["block", "site"]
    steps: int | None
    validation: int
    alpha_lr: float
    power: int
    lr: float
    head_lr: float | None
    seed: int
    loss_fn: Loss | None


def build(
    *,
    keep: Keep | None = 0.5,
    unit: Literal["block", "site"] = "block",
    steps: int | None = None,
    validation: int = 8,
    alpha_lr: float = 0.01,
    power: int = 1,
    lr: float = 1e-3,
    head_lr: float | None = None,
    seed: int = 0,
    loss_fn: Loss | None = None,
) -> Method:
    """Return the method.

    Args:
        keep: As in :func:`weightlora.select`, for whole blocks by falling α. None is the paper: all with α > 0.
        unit: What has an α: a ``"block"``, as in the paper, or every ``"site"``.
        steps: Steps of A and B, each followed by one of α. None: a tenth of the training's steps, at least 20.
        validation: Batches held out for α; each step of α uses all of them. The authors' code uses 8 in a step.
        alpha_lr: Adam's learning rate for α.
        power: ŵ^power scales the adapters: 1 is the paper, 3 the effect of the authors' code.
        lr: AdamW's learning rate for A, B and a new task head.
        head_lr: That of the new head, if another.
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

    return ChoosingMethod(
        partial(_choose, _Options(keep, unit, steps, validation, alpha_lr, power, lr, head_lr, seed, loss_fn))
    )


def _choose(
    options: _Options, model: nn.Module, lora: LoraConfig, batches: Iterable[Any], total_steps: int
) -> AdapterPlan:
    found = find_sites(model, lora)
    sites = found.sites
    units = [(site.block or site.name) if options.unit == "block" else site.name for site in sites]
    budget = read_budget(len(sites) if options.keep is None else options.keep, adapter_parameters(sites, lora))
    steps = max(20, math.ceil(total_steps / 10)) if options.steps is None else options.steps
    options = replace(options, steps=steps)
    used = _interleaved(batches, steps, options.validation)
    total = steps * (1 + options.validation)
    given: dict[str, Any] = {"seed": options.seed, "loss_fn": options.loss_fn, "head_lr": options.head_lr}
    with probed(model, lora, sites, batches=used, steps=total, **given) as stage:
        history = _descend(stage, units, steps, options)
    alpha = history[-1]
    kept = _fill(sites, units, alpha, budget, positive=options.keep is None)
    if not kept:
        raise SelectionError(_nothing_kept(options.keep))
    recorded = ("keep", "unit", "steps", "validation", "alpha_lr", "power", "lr", "head_lr")
    return make_plan(
        sites,
        lora,
        kept,
        alpha,
        history=tuple(map(tuple, history)),
        rule="flexora",
        options={name: getattr(options, name) for name in recorded},
        seed=options.seed,
        base_model=base_model_name(model),
        target_parameters=found.parameters,
    )


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


def _nothing_kept(keep: Keep | None) -> str:
    if keep is None:
        return "no block has an alpha above 0; raise steps, or give keep="
    return f"no whole block fits keep={keep!r}; raise keep, or take unit='site'"


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


def _descend(stage: Stage, units: Sequence[str], steps: int, options: _Options) -> list[list[float]]:
    """Train adapters and α, and return α of every site's unit after each step."""
    names = list(dict.fromkeys(units))
    place = torch.tensor([names.index(unit) for unit in units])
    alpha = torch.zeros(len(names), requires_grad=True)
    adapters = adapter_weights(stage)
    trained = [*adapters, *stage.head]
    let_train(stage, trained)
    optimizer = stage.optimizer(adapters, options.lr)
    alpha_optimizer = torch.optim.Adam([alpha], lr=options.alpha_lr)
    history: list[list[float]] = []
    with gated(stage.layers) as gates:
        for step in range(1, steps + 1):
            weights = unit_weights(alpha.detach())
            gates.write((weights**options.power)[place])
            stage.backward("adapters", step, trained)
            optimizer.step()
            optimizer.zero_grad()
            with evaluated(stage.model):
                for _ in range(options.validation):
                    stage.backward("alpha", step, trained)
            gradient = torch.zeros(len(names)).index_add(0, place, gates.gradient / options.validation)
            optimizer.zero_grad()
            alpha.grad = alpha_gradient(weights, gradient, options.power)
            alpha_optimizer.step()
            history.append(alpha.detach()[place].tolist())
    return history


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
