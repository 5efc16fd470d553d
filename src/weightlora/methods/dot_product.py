"""The gradient dot product (Veprikov et al., section 2.1): keeps adapters that moved far along the base's gradient.

score_i = |⟨∂L/∂W_i(W0), ΔW_i⟩| with ΔW_i = s·B_i·A_i of an adapter after a short training; the K largest are kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from weightlora.errors import OptionError, SelectionError
from weightlora.methods.base import ChoosingMethod, Method
from weightlora.model.sites import Site, adapter_parameters, find_sites
from weightlora.plan.budget import Keep, read_budget
from weightlora.plan.make import make_plan
from weightlora.plan.plan import AdapterPlan
from weightlora.plan.provenance import base_model_name
from weightlora.selection.batches import Loss, cycled
from weightlora.selection.stage import Stage, adapter_weights, let_train, probed, train_adapters

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn


@dataclass(frozen=True)
class _Options:
    keep: Keep
    steps: int
    alone: bool
    by: Literal["magnitude", "descent"]
    lr: float
    head_lr: float | None
    seed: int
    loss_fn: Loss | None


def build(
    *,
    keep: Keep = 0.5,
    steps: int = 20,
    alone: bool = False,
    by: Literal["magnitude", "descent"] = "magnitude",
    lr: float = 1e-3,
    head_lr: float | None = None,
    seed: int = 0,
    loss_fn: Loss | None = None,
) -> Method:
    """Return the method.

    Args:
        keep: As in :func:`weightlora.select`.
        steps: Batches that the adapters are trained on. The gradient at W0 is the mean over as many. The paper trains
            for "several epochs".
        alone: Train the adapter of each site separately, as the paper does: n trainings of ``steps``. False trains
            all adapters together once.
        by: ``"magnitude"`` is the paper's figure; ``"descent"`` scores by −⟨∂L/∂W, ΔW⟩, where it is positive.
        lr: AdamW's learning rate.
        head_lr: That of a new head; None stands for ``lr``.
        seed: Decides A's random start and dropout.
        loss_fn: As in :func:`weightlora.select`.

    Raises:
        OptionError: An argument is out of its range.
    """
    if steps < 1:
        raise OptionError(f"steps={steps} is not allowed: give at least 1 batch")
    if by not in ("magnitude", "descent"):
        raise OptionError(f"by={by!r} is not allowed: give 'magnitude' or 'descent'")

    return ChoosingMethod(partial(_choose, _Options(keep, steps, alone, by, lr, head_lr, seed, loss_fn)))


def _choose(
    options: _Options, model: nn.Module, lora: LoraConfig, batches: Iterable[Any], _total_steps: int
) -> AdapterPlan:
    found = find_sites(model, lora)
    sites = found.sites
    budget = read_budget(options.keep, adapter_parameters(sites, lora))
    names = [site.name for site in sites]
    training = {name: getattr(options, name) for name in ("steps", "alone", "lr", "head_lr", "seed", "loss_fn")}
    products = dot_products(model, lora, sites, batches, **training)
    scores = [abs(products[name]) if options.by == "magnitude" else -products[name] for name in names]
    kept = [i for i in budget.choose(scores) if scores[i] > 0]
    if not kept:
        raise SelectionError("no adapter moved along its gradient; raise steps or lr, or take by='magnitude'")
    return make_plan(
        sites,
        lora,
        [names[i] for i in kept],
        scores,
        rule="dot_product",
        options={name: getattr(options, name) for name in ("keep", "steps", "alone", "by", "lr", "head_lr")},
        seed=options.seed,
        base_model=base_model_name(model),
        target_parameters=found.parameters,
    )


def dot_products(
    model: nn.Module,
    lora: LoraConfig,
    sites: Sequence[Site],
    batches: Iterable[Any],
    *,
    steps: int,
    alone: bool,
    lr: float,
    head_lr: float | None = None,
    head_steps: int = 0,
    seed: int = 0,
    loss_fn: Loss | None = None,
) -> dict[str, float]:
    """Return ⟨∂L/∂W_i(W0), s·B_i·A_i⟩ of each site, signed; ``model`` is restored bit for bit.

    Args:
        model: The base model.
        lora: The adapters' configuration; dropout is switched off.
        sites: All candidates.
        batches: As in :func:`weightlora.select`; the first ``head_steps`` train the head, ``steps`` more all the rest.
        steps: As in :func:`build`.
        alone: As in :func:`build`.
        lr: As in :func:`build`.
        head_lr: As in :func:`build`.
        head_steps: Steps in which a new task head is trained before any adapter.
        seed: As in :func:`build`.
        loss_fn: As in :func:`weightlora.select`.
    """
    runs = [[site.name] for site in sites] if alone else [[site.name for site in sites]]
    rows = list(cycled(batches, head_steps + steps))
    shown = itertools.chain(rows[:head_steps], itertools.cycle(rows[head_steps:]))  # all trainings use the same rows
    total = head_steps + 2 * steps * len(runs)
    plain = replace(lora, lora_dropout=0.0)  # the products are those of all of ΔW
    products: dict[str, float] = {}
    given: dict[str, Any] = {"seed": seed, "loss_fn": loss_fn, "head_lr": head_lr}
    with probed(model, plain, sites, batches=shown, steps=total, **given) as stage:
        if head_steps:
            train_adapters(stage, steps=head_steps, lr=lr, names=())
        begin = [parameter.detach().clone() for parameter in (*adapter_weights(stage), *stage.head)]
        for run in runs:
            with torch.no_grad():
                for parameter, value in zip((*adapter_weights(stage), *stage.head), begin, strict=True):
                    parameter.copy_(value)
            train_adapters(stage, steps=steps, lr=lr, names=run)
            products |= _products(stage, run, steps)
    return products


def _products(stage: Stage, names: Sequence[str], steps: int) -> dict[str, float]:
    """Return ⟨∂L/∂W(W0), s·B·A⟩ of the sites ``names``, with the mean gradient of ``steps`` batches at B = 0.

    At B = 0, ∂L/∂B = s·∂L/∂W·Aᵀ, so the product is ⟨B, ∂L/∂B⟩. It needs no matrix of size out × in and no gradient of
    base weights, which may be quantised.
    """
    matrices = dict(zip(stage.layers, stage.parameters("lora_B"), strict=True))
    trained = {name: matrices[name].detach().clone() for name in names}
    with torch.no_grad():
        for matrix in matrices.values():
            matrix.zero_()
    measured = [matrices[name] for name in names]
    let_train(stage, measured)
    for step in range(1, steps + 1):
        stage.backward("gradients", step, measured)  # accumulates in .grad
    # A site that the loss does not depend on has no gradient.
    gradients = [torch.zeros_like(b) if b.grad is None else b.grad / steps for b in measured]
    return {n: float((trained[n] * g).sum()) for n, g in zip(names, gradients, strict=True)}
