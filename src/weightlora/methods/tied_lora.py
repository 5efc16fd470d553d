"""Tied-LoRA (Renduchintala et al. 2023, arXiv:2311.09578): one A and one B for all sites of a shape, scaled at each.

ΔW = s·diag(u)·B·diag(v)·A: u (out) and v (r) are trained for every site, A (r, in) and B (out, r) once for all.
"""

from __future__ import annotations

from functools import partial
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


def build(*, train_shared: bool = True) -> Method:
    """Return the method.

    Args:
        train_shared: Train A and B as well as u and v, the paper's configuration TL6. False keeps A and B random and
            trains only u and v, as in VeRA.
    """
    return ExpandedMethod(partial(_attach, train_shared), layer_factors)


def _attach(train_shared: bool, model: nn.Module, lora: LoraConfig) -> tuple[AdapterPlan, PeftModel]:
    sites, own = find_sites(model, lora).sites, {"train_shared": train_shared}
    plan = uniform_plan(model, lora, sites, r=lora.r, alpha=lora.lora_alpha, rule="tied_lora", options=own)
    attached = plan.attach(model)
    tie(attached, train_shared=train_shared)
    return plan, attached


@torch.no_grad()
def tie(model: PeftModel, *, train_shared: bool) -> None:
    """Make the A and B of all layers of a shape scaled copies of the first one's; v starts at 1, u at 0."""
    layers: dict[str, Any] = dict(lora_layers(model))
    shared: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for layer in layers.values():
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        shape = (layer.in_features, layer.out_features)
        if shape not in shared:
            nn.init.kaiming_uniform_(b.weight, a=5**0.5)  # as PEFT's A; u starts at 0 instead of B
            pair = (a.weight.clone(), b.weight.clone())
            shared[shape] = (nn.Parameter(pair[0]), nn.Parameter(pair[1])) if train_shared else pair
        for matrix, of_all, start in zip((a, b), shared[shape], (1.0, 0.0), strict=True):
            register_parametrization(matrix, "weight", Scaled(of_all, start))


class Scaled(nn.Module):
    """A weight diag(x)·M: x is the layer's own, and several layers share M.

    Args:
        matrix: M; it is trained if it is a parameter.
        start: x at the start.
    """

    def __init__(self, matrix: Tensor, start: float) -> None:
        super().__init__()
        self.start = start
        self.matrix: Tensor
        if isinstance(matrix, nn.Parameter):
            self.matrix = matrix
        else:
            self.register_buffer("matrix", matrix)

    def forward(self, scale: Tensor) -> Tensor:
        """(rows, 1) → (rows, columns)."""
        return scale * self.matrix.to(scale.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return x at the start in place of PEFT's matrix: (rows, 1), as PEFT does not accept (rows,)."""
        return weight.new_full((len(weight), 1), self.start)
