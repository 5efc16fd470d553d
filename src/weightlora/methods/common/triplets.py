"""Adapters as sums of triplets, ΔW = s·B·diag(e)·A, each of which can be switched off: PEFT's AdaLoRA layers.

AdaLoRA and Dynamic LoRA start with more triplets than the budget and set numbers e to 0. IncreLoRA starts with fewer
and trains further e later. The triplets that are on at the end become stock LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from weightlora.errors import OptionError, SelectionError
from weightlora.methods.common.export import Factors, become_stock, factors_plan
from weightlora.model.layers import lora_layers
from weightlora.model.sites import Site, require_uniform, tuner_fields
from weightlora.plan.make import make_plan
from weightlora.plan.plan import AdapterPlan
from weightlora.plan.provenance import base_model_name

Alpha = Literal["scale", "keep"]


def attach_triplets(
    model: nn.Module, lora: LoraConfig, sites: Sequence[Site], *, init_r: int, alpha: Alpha, name: str, **schedule: Any
) -> PeftModel:
    """Put ``init_r`` triplets with e = 0 on each of ``sites``.

    Args:
        model: The base model.
        lora: The budget.
        sites: All candidates.
        init_r: Triplets of a site.
        alpha: ``"scale"`` scales each by alpha/r as in plain LoRA, ``"keep"`` by alpha/init_r.
        name: The method's name, for errors.
        schedule: Further fields of PEFT's ``AdaLoraConfig``.

    Raises:
        OptionError: ``lora`` treats sites differently, or ``init_r`` leaves nothing to switch off.
    """
    require_uniform(name, lora)
    if init_r <= lora.r:
        raise OptionError(f"init_r={init_r} is not allowed: give more than r={lora.r}, the rank at the end")
    if alpha not in ("scale", "keep"):
        raise OptionError(f"alpha={alpha!r} is not allowed: give 'scale' or 'keep'")
    config = AdaLoraConfig(
        init_r=init_r,
        target_r=lora.r,
        lora_alpha=lora.lora_alpha * init_r / lora.r if alpha == "scale" else lora.lora_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.lora_dropout,
        **tuner_fields(lora, sites),
        **schedule,
    )
    attached: Any = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    layers: dict[str, Any] = dict(lora_layers(attached))
    for layer in layers.values():
        # With a bf16 base or one on a GPU, PEFT makes a new parameter of it that would be trained and not saved.
        count = layer.ranknum["default"].detach().float().fill_(init_r)
        layer.ranknum["default"] = nn.Parameter(count, requires_grad=False)
    return attached


def triplet_plan(model: nn.Module, lora: LoraConfig, sites: Sequence[Site], init_r: int, **record: Any) -> AdapterPlan:
    """Return the plan of a model at the start: ``init_r`` triplets on all sites."""
    plan = make_plan(sites, lora, [site.name for site in sites], base_model=base_model_name(model), **record)
    return replace(plan, entries=tuple(replace(e, r=init_r) for e in plan.entries))


def plan_under(plan: AdapterPlan, masks: Mapping[str, Tensor] | None) -> AdapterPlan:
    """Return the plan with only the triplets that ``masks`` leave on; None leaves all on."""
    if masks is None:
        return plan
    return replace(plan, entries=tuple(replace(e, r=int(masks[e.site.name].sum())) for e in plan.entries))


def export_triplets(model: PeftModel, plan: AdapterPlan, *, budget: int, name: str) -> AdapterPlan:
    """Make ``model`` stock LoRA of the triplets that are on, and return its plan.

    Raises:
        SelectionError: More are on than ``budget``: the method did not run to its end.
    """
    layers: dict[str, Any] = dict(lora_layers(model))
    factors = {site: triplet_factors(layer) for site, layer in layers.items()}
    ranks = sum(factor.rank for factor in factors.values())
    if ranks > budget:
        raise SelectionError(
            f"{name} has {ranks} ranks left, {budget} are the budget: it did not run to the end; give the trainer "
            "callbacks=method.callbacks(), and train all of the steps"
        )
    plan = factors_plan(plan, factors)
    become_stock(model, plan, factors)
    return plan


def triplet_factors(layer: Any) -> Factors:
    """Return B·diag(e)·A of the triplets with e ≠ 0, times PEFT's scale alpha/(init_r + 1e-5)."""
    a, b, e = (matrix["default"].detach() for matrix in (layer.lora_A, layer.lora_B, layer.lora_E))
    kept = e.flatten() != 0
    return Factors((e * a)[kept], b[:, kept], layer.scaling["default"] / (layer.ranknum["default"].item() + 1e-5))


@torch.no_grad()
def switch_off(layer: Any, mask: Tensor) -> None:
    """Set e to 0 where ``mask`` (r,) is false."""
    e = layer.lora_E["default"]
    e.masked_fill_(~mask.to(e.device).unsqueeze(1), 0.0)


def orthogonality_gradient(rows: Tensor) -> Tensor:
    """Return the gradient of ‖R·Rᵀ − I‖_F with respect to R (r, d): 2·(R·Rᵀ − I)·R / ‖R·Rᵀ − I‖_F.

    Example:
        >>> orthogonality_gradient(torch.tensor([[2.0, 0.0]]))
        tensor([[4., 0.]])
    """
    rest = rows @ rows.T - torch.eye(len(rows), device=rows.device, dtype=rows.dtype)
    return 2 * rest @ rows / rest.norm().clamp(min=1e-12)


def require_steps(name: str, attached: int, trained: int) -> None:
    """Raise unless the training takes the number of steps that the schedule was made for.

    Raises:
        OptionError: It takes another number.
    """
    if attached != trained:
        raise OptionError(
            f"{name} was attached for {attached} steps and the training takes {trained}; attach it with the number of "
            "optimizer steps"
        )
