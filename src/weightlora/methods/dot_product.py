"""The gradient dot product (Veprikov et al., section 2.1): adapters that moved far along the model's own gradient.

score_i = |⟨∂L/∂W_i(W0), ΔW_i⟩|, ΔW_i = s·B_i·A_i of an adapter that was trained for a while; the K largest are kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from weightlora.errors import OptionError, SelectionError
from weightlora.methods.base import ChoosingMethod, Method
from weightlora.model.sites import Site, adapter_parameters, find_sites
from weightlora.plan.budget import Keep, read_budget
from weightlora.plan.plan import AdapterPlan, base_model_name, make_plan
from weightlora.selection.batches import Loss, cycled
from weightlora.selection.stage import Stage, adapter_weights, let_train, probed, train_adapters

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn


def build(
    *,
    keep: Keep = 0.5,
    steps: int = 20,
    alone: bool = False,
    by: Literal["magnitude", "descent"] = "magnitude",
    lr: float = 1e-3,
    seed: int = 0,
    loss_fn: Loss | None = None,
) -> Method:
    """Return the method.

    Args:
        keep: As in :func:`weightlora.select`.
        steps: Batches that the adapters are trained on; the gradient of W0 is the mean over as many. The paper trains
            for "several epochs".
        alone: Train the adapter of each site by itself, as the paper does: n trainings of ``steps``. False trains
            all adapters together once.
        by: ``"magnitude"`` is the paper's figure; ``"descent"`` keeps only adapters that went downhill, −⟨∂L/∂W, ΔW⟩.
        lr: AdamW's learning rate for the adapters.
        seed: Decides A's random start and dropout.
        loss_fn: As in :func:`weightlora.select`.

    Raises:
        OptionError: An argument is out of its range.
    """
    if steps < 1:
        raise OptionError(f"steps={steps} is not allowed: give at least 1 batch")
    if by not in ("magnitude", "descent"):
        raise OptionError(f"by={by!r} is not allowed: give 'magnitude' or 'descent'")

    def choose(model: nn.Module, lora: LoraConfig, batches: Iterable[Any], _total_steps: int) -> AdapterPlan:
        sites = find_sites(model, lora).sites
        budget = read_budget(keep, adapter_parameters(sites, lora))
        names = [site.name for site in sites]
        products = dot_products(
            model, lora, sites, batches, steps=steps, alone=alone, lr=lr, seed=seed, loss_fn=loss_fn
        )
        scores = [abs(products[name]) if by == "magnitude" else -products[name] for name in names]
        kept = [i for i in budget.choose(scores) if scores[i] > 0]
        if not kept:
            raise SelectionError("no adapter moved along its gradient; raise steps or lr, or take by='magnitude'")
        return make_plan(
            sites,
            lora,
            [names[i] for i in kept],
            scores,
            rule="dot_product",
            options={"keep": keep, "steps": steps, "alone": alone, "by": by, "lr": lr},
            seed=seed,
            base_model=base_model_name(model),
        )

    return ChoosingMethod(choose)


def dot_products(
    model: nn.Module,
    lora: LoraConfig,
    sites: Sequence[Site],
    batches: Iterable[Any],
    *,
    steps: int,
    alone: bool,
    lr: float,
    head_steps: int = 0,
    seed: int = 0,
    loss_fn: Loss | None = None,
) -> dict[str, float]:
    """Return ⟨∂L/∂W_i(W0), s·B_i·A_i⟩ of each site, signed; ``model`` is left bit for bit as it was.

    Args:
        model: The base model.
        lora: The adapters wanted; their dropout is left out.
        sites: All candidates.
        batches: As in :func:`weightlora.select`; the first go to the head, as many as ``steps`` to all else.
        steps: As in :func:`build`.
        alone: As in :func:`build`.
        lr: As in :func:`build`.
        head_steps: Steps in which fresh heads are trained before any adapter is.
        seed: As in :func:`build`.
        loss_fn: As in :func:`weightlora.select`.
    """
    runs = [[site.name] for site in sites] if alone else [[site.name for site in sites]]
    rows = list(cycled(batches, head_steps + steps))
    shown = itertools.chain(rows[:head_steps], itertools.cycle(rows[head_steps:]))  # all trainings see the same rows
    total = head_steps + 2 * steps * len(runs)
    still = replace(lora, lora_dropout=0.0)  # the products are to be those of ΔW, not of a part of it
    products: dict[str, float] = {}
    with probed(model, still, sites, batches=shown, steps=total, seed=seed, loss_fn=loss_fn) as stage:
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
    """⟨∂L/∂W(W0), s·B·A⟩ of the sites ``names``, the gradient a mean over ``steps`` batches with all adapters at 0.

    At B = 0, ∂L/∂B = s·∂L/∂W·Aᵀ, so the product is ⟨B, ∂L/∂B⟩: nothing of size out × in is made, and base weights
    need no gradient, so that they may be quantised.
    """
    matrices = dict(zip(stage.layers, stage.parameters("lora_B"), strict=True))
    trained = {name: matrices[name].detach().clone() for name in names}
    with torch.no_grad():
        for matrix in matrices.values():
            matrix.zero_()
    heard = [matrices[name] for name in names]
    let_train(stage, heard)
    for step in range(1, steps + 1):
        stage.backward("gradients", step, heard)  # .grad is left to add up
    # A site that the loss does not reach has no gradient at all.
    gradients = [torch.zeros_like(b) if b.grad is None else b.grad / steps for b in heard]
    return {n: float((trained[n] * g).sum()) for n, g in zip(names, gradients, strict=True)}
