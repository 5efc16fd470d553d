"""Full fine-tuning of the sites' weights, without a budget: the reference of the paper's Table 1.

ΔW itself is trained, from zero. It is LoRA of full rank, ΔW = B·I at a site with out ≥ in and I·A where out < in, so it
ends as stock LoRA like all others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from weightlora.methods.base import ExpandedMethod, Start, uniform_plan

if TYPE_CHECKING:
    from weightlora.plan.plan import AdapterPlan


class Full(ExpandedMethod):
    """Full fine-tuning; it uses only the sites of the LoRA config, not its rank."""

    def _planned(self, start: Start) -> AdapterPlan:
        plan = uniform_plan(start, r=start.lora.r, alpha=start.lora.r, rule="full")
        ranks = [min(site.in_features, site.out_features) for site in start.sites]
        entries = [replace(entry, r=r, alpha=r) for entry, r in zip(plan.entries, ranks, strict=True)]
        return replace(plan, entries=tuple(entries))

    def _change(self, layers: Mapping[str, Any]) -> None:
        for layer in layers.values():
            a, b = layer.lora_A["default"], layer.lora_B["default"]
            if a.weight.shape[0] == a.weight.shape[1]:
                frozen = a
            else:
                frozen = b
                nn.init.zeros_(a.weight)  # the trained one of the two starts at zero
            register_parametrization(frozen, "weight", Identity(frozen.weight))


build = Full


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
