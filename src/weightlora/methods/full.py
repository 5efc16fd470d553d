"""Full fine-tuning of the sites' weights, without a budget: the reference of the paper's Table 1.

ΔW itself is trained, from zero. It is LoRA of full rank, ΔW = B·I at a site with out ≥ in and I·A where out < in, so it
ends as stock LoRA like all others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from weightlora.methods.base import ExpandedMethod, Method, uniform_plan
from weightlora.methods.common.export import layer_factors
from weightlora.model.layers import lora_layers
from weightlora.model.sites import find_sites

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

    from weightlora.plan.plan import AdapterPlan


def build() -> Method:
    """Return the method; it uses only the sites of the LoRA config, not its rank."""
    return ExpandedMethod(_attach, layer_factors)


def _attach(model: nn.Module, lora: LoraConfig) -> tuple[AdapterPlan, PeftModel]:
    sites = find_sites(model, lora).sites
    uniform = uniform_plan(model, lora, sites, r=lora.r, alpha=lora.r, rule="full")
    ranks = [min(entry.site.in_features, entry.site.out_features) for entry in uniform.entries]
    entries = [replace(entry, r=r, alpha=r) for entry, r in zip(uniform.entries, ranks, strict=True)]
    plan = replace(uniform, entries=tuple(entries))
    attached = plan.attach(model)
    layers: dict[str, Any] = dict(lora_layers(attached))
    for layer in layers.values():
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        if a.weight.shape[0] == a.weight.shape[1]:
            frozen = a
        else:
            frozen = b
            nn.init.zeros_(a.weight)  # the trained one of the two starts at zero
        register_parametrization(frozen, "weight", Identity(frozen.weight))
    return plan, attached


class Identity(nn.Module):
    """A weight that is always the identity.

    Args:
        like: A square matrix of the same size, device and type.
    """

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.eye: Tensor
        self.register_buffer("eye", torch.eye(len(like), device=like.device, dtype=like.dtype))

    def forward(self, unused: Tensor) -> Tensor:
        """(1, 1) → (r, r), in the number type of the adapters."""
        return self.eye.to(unused.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return one unused number: PEFT takes an empty matrix for a lost shard."""
        return weight.new_zeros(1, 1)
