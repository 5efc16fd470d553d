"""Factors of a site's update, ΔW = scale·B·A: of its weight's singular triplets, and as stock LoRA at the end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.vera.layer import VeraLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from weightlora.model.gathering import loaded
from weightlora.model.layers import lora_layers, take_tuner
from weightlora.plan.plan import AdapterPlan


@dataclass(frozen=True)
class Factors:
    """The update of a site's adapter, ΔW = scale·B·A, and scale·bias."""

    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    scale: float
    bias: Tensor | None = None  # (out,), that of B

    @property
    def rank(self) -> int:
        """Remaining components; 0 = no adapter."""
        return int(self.a.shape[0])


def layer_factors(layer: Any) -> Factors:
    """Return A, B and scale of a LoRA layer, also if A and B are computed from other parameters."""
    a, b = _weights(layer)
    bias = layer.lora_B["default"].bias
    return Factors(a.detach(), b.detach(), layer.scaling["default"], None if bias is None else bias.detach())


@torch.no_grad()
def singular_factors(layer: LoraLayer, which: slice) -> tuple[Tensor, Tensor]:
    """Return A = √Σ·Vᵀ (r, in) and B = U·√Σ (out, r) of some triplets of the base layer's weight, in fp32.

    Args:
        layer: A LoRA layer; a quantised weight is dequantised.
        which: Triplets by falling σ: ``slice(8)`` for the eight largest, ``slice(-8, None)`` for the smallest.

    Example:
        >>> from peft.tuners.lora import Linear
        >>> from peft import LoraConfig
        >>> base = torch.nn.Linear(2, 2, bias=False)
        >>> base.weight.data = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
        >>> a, b = singular_factors(Linear(base, "default", LoraConfig(), r=1), slice(1))
        >>> b @ a
        tensor([[4., 0.],
                [0., 0.]])
    """
    base: Any = layer.get_base_layer()
    with loaded(base):
        weight = dequantize_module_weight(base).detach().float()
    u, s, v = torch.linalg.svd(weight.T if isinstance(base, Conv1D) else weight, full_matrices=False)
    roots = s[which].sqrt()
    return roots.unsqueeze(1) * v[which], u[:, which] * roots


def factors_plan(plan: AdapterPlan, factors: Mapping[str, Factors]) -> AdapterPlan:
    """Return ``plan`` with the ranks of ``factors``, and whole alphas that are equal on all sites.

    PEFT's scale is alpha/r, so alpha = scale·r; rsLoRA's, alpha/√r, is left out of the config. Where these alphas are
    not one whole number, plain LoRA's alpha takes their place, and :func:`become_stock` multiplies B by the rest: some
    runtimes read one ``lora_alpha`` for all sites, as a whole number.

    Example:
        >>> from weightlora.plan.plan import PlannedSite
        >>> from weightlora.model.sites import Site
        >>> plan = AdapterPlan((PlannedSite(Site("a", 4, 4), 4, 8, r=4, alpha=8, score=0.0),))
        >>> (entry,) = factors_plan(plan, {"a": Factors(torch.ones(3, 4), torch.ones(4, 3), scale=2.0)}).entries
        >>> entry.r, entry.alpha
        (3, 6)
    """
    alphas = {_whole(factor.scale * factor.rank) for factor in factors.values() if factor.rank}
    one = alphas.pop() if len(alphas) == 1 else None
    entries = tuple(
        replace(e, r=rank, alpha=e.lora_alpha if rank == 0 else one or max(1, round(e.lora_alpha)))
        for e in plan.entries
        for rank in [factors[e.site.name].rank]
    )
    return replace(plan, entries=entries, lora={k: v for k, v in plan.lora.items() if k != "use_rslora"})


@torch.no_grad()
def become_stock(model: PeftModel, plan: AdapterPlan, factors: Mapping[str, Factors]) -> PeftModel:
    """Replace the adapters of ``model`` by stock LoRA that holds ``factors``; the object and its logits stay the same.

    Modules that PEFT trains whole keep their trained and their original weights.

    Args:
        model: A PEFT model with any tuner.
        plan: The result of :func:`factors_plan`.
        factors: One for each site; those of rank 0 are left out.
    """
    learned = [wrapper.modules_to_save["default"].state_dict() for _, wrapper in _wrappers(model)]
    base: nn.Module = model.get_base_model()
    for name, wrapper in list(_wrappers(model)):
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, wrapper.original_module)
    tuner: Any = model.base_model
    new = plan.attach(tuner.unload())
    for name, layer in lora_layers(new).items():
        a, b = _weights(layer)
        factor = factors[name]
        ratio = factor.scale / layer.scaling["default"]
        a.copy_(factor.a)
        b.copy_(factor.b * ratio)
        if factor.bias is not None:
            bias: Any = layer.lora_B["default"].bias
            bias.copy_(factor.bias * ratio)
    for (_, wrapper), state in zip(_wrappers(new), learned, strict=True):
        wrapper.modules_to_save["default"].load_state_dict(state)
    take_tuner(model, new)
    return model


def cast_trained(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast all trained parameters of ``model`` to one number type.

    Modules that are trained whole are never made wider: what reads their output has the model's type.
    """
    for name, parameter in model.named_parameters():
        wider = dtype.itemsize > parameter.dtype.itemsize
        if parameter.requires_grad and not (wider and ".modules_to_save." in name):
            parameter.data = parameter.data.to(dtype=dtype)
    for layer in model.modules():
        if isinstance(layer, VeraLayer):  # multiplies them with its frozen projections
            projections: Any = (layer.vera_A, layer.vera_B)
            for projection in projections:
                projection["default"] = projection["default"].to(dtype=dtype)


def _whole(alpha: float) -> int | None:
    """The whole number that ``alpha`` is, but for the rounding of a few operations in float64; None for any other."""
    whole = round(alpha)
    return whole if whole > 0 and math.isclose(alpha, whole, rel_tol=1e-12) else None


def _wrappers(model: PeftModel) -> Iterator[tuple[str, ModulesToSaveWrapper]]:
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            yield name, module


def _weights(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight
