"""The gradient dot product (Veprikov et al., section 2.1): keeps adapters that moved far along the base's gradient.

score_i = |⟨∂L/∂W_i(W0), ΔW_i⟩| with ΔW_i = s·B_i·A_i of an adapter after a short training; the K largest are kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from weightlora.errors import SelectionError
from weightlora.methods.base import PlanningMethod, plan_of, recorded
from weightlora.model.sites import Site, find_sites
from weightlora.plan.limits import Limits
from weightlora.plan.plan import AdapterPlan
from weightlora.selection.allocate import site_budget
from weightlora.selection.batches import Loss, cycled
from weightlora.selection.stage import Stage, adapter_weights, let_train, probed, train_adapters
from weightlora.validation import Count, Positive

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn


@dataclass(kw_only=True, eq=False)
class DotProduct(PlanningMethod):
    """The gradient dot product.

    Args:
        adapters: At most so many adapters, or this share of them; half where neither limit is given.
        parameters: At most so many parameters of whole adapters, or this share of LoRA's.
        steps: Batches that the adapters are trained on. The gradient at W0 is the mean over as many. The paper trains
            for "several epochs".
        alone: Train the adapter of each site separately, as the paper does: n trainings of ``steps``. False trains
            all adapters together once.
        by: ``"magnitude"`` is the paper's figure; ``"descent"`` scores by −⟨∂L/∂W, ΔW⟩, where it is positive.
        learning_rate: AdamW's learning rate.
        head_learning_rate: That of a new head; None stands for ``learning_rate``.
        seed: Decides A's random start and dropout.
        loss_fn: As in :func:`weightlora.select`.
    """

    adapters: float | None = None
    parameters: float | None = None
    steps: Count = 20
    alone: bool = False
    by: Literal["magnitude", "descent"] = "magnitude"
    learning_rate: Positive = 1e-3
    head_learning_rate: Positive | None = None
    seed: int = 0
    loss_fn: Loss | None = None

    def choose(self, model: nn.Module, lora: LoraConfig, batches: Iterable[Any], _total_steps: int, /) -> AdapterPlan:
        """Keep the sites with the largest products."""
        found = find_sites(model, lora)
        sites, names = found.sites, [site.name for site in found.sites]
        budget = site_budget(sites, lora, Limits(adapters=self.adapters, parameters=self.parameters))
        rates: dict[str, Any] = {
            "learning_rate": self.learning_rate,
            "head_learning_rate": self.head_learning_rate,
            "seed": self.seed,
            "loss_fn": self.loss_fn,
        }
        products = dot_products(model, lora, sites, batches, steps=self.steps, alone=self.alone, **rates)
        scores = [abs(products[name]) if self.by == "magnitude" else -products[name] for name in names]
        kept = [names[i] for i in budget.choose(scores) if scores[i] > 0]
        if not kept:
            raise SelectionError(
                "no adapter moved along its gradient; raise steps or learning_rate, or take by='magnitude'"
            )
        record = {"rule": "dot_product", "options": recorded(self), "seed": self.seed}
        return plan_of(model, lora, found, kept, scores, **record)


build = DotProduct


def dot_products(
    model: nn.Module,
    lora: LoraConfig,
    sites: Sequence[Site],
    batches: Iterable[Any],
    *,
    steps: int,
    alone: bool,
    learning_rate: float,
    head_learning_rate: Positive | None = None,
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
        steps: As in :class:`DotProduct`.
        alone: As in :class:`DotProduct`.
        learning_rate: As in :class:`DotProduct`.
        head_learning_rate: As in :class:`DotProduct`.
        head_steps: Steps in which a new task head is trained before any adapter.
        seed: As in :class:`DotProduct`.
        loss_fn: As in :func:`weightlora.select`.
    """
    runs = [[site.name] for site in sites] if alone else [[site.name for site in sites]]
    rows = list(cycled(batches, head_steps + steps))
    shown = itertools.chain(rows[:head_steps], itertools.cycle(rows[head_steps:]))  # all trainings use the same rows
    total = head_steps + 2 * steps * len(runs)
    plain = replace(lora, lora_dropout=0.0)  # the products are those of all of ΔW
    products: dict[str, float] = {}
    given: dict[str, Any] = {"seed": seed, "loss_fn": loss_fn, "head_learning_rate": head_learning_rate}
    with probed(model, plain, sites, batches=shown, steps=total, **given) as stage:
        if head_steps:
            train_adapters(stage, steps=head_steps, learning_rate=learning_rate, names=())
        begin = [parameter.detach().clone() for parameter in (*adapter_weights(stage), *stage.head)]
        for run in runs:
            with torch.no_grad():
                for parameter, value in zip((*adapter_weights(stage), *stage.head), begin, strict=True):
                    parameter.copy_(value)
            train_adapters(stage, steps=steps, learning_rate=learning_rate, names=run)
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
