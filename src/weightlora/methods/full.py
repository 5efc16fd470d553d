"""Full fine-tuning of the sites' weights: the reference of the paper's Table 1, which no budget binds.

ΔW itself is trained, from zero. It is LoRA of full rank: ΔW = B·I at a site with out ≥ in, I·A where out < in, and
so it ends as stock LoRA like all others.
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
    """Return the method; of the budget, only the sites count."""

    def attach(model: nn.Module, lora: LoraConfig) -> tuple[AdapterPlan, PeftModel]:
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
                nn.init.zeros_(a.weight)  # what is trained starts at zero, whichever of the two it is
            register_parametrization(frozen, "weight", Identity(frozen.weight))
        return plan, attached

    return ExpandedMethod(attach, layer_factors)


class Identity(nn.Module):
    """A weight that is the identity whatever is trained.

    Args:
        like: A square matrix of the same size, device and type.
    """

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.eye: Tensor
        self.register_buffer("eye", torch.eye(len(like), device=like.device, dtype=like.dtype))

    def forward(self, unused: Tensor) -> Tensor:
        """(1, 1) → (r, r), of the type that the adapters are trained in."""
        return self.eye.to(unused.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """One number that nothing depends on: PEFT takes a matrix of none for a shard that was lost."""
        return weight.new_zeros(1, 1)
