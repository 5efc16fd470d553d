"""Tied-LoRA (Renduchintala et al. 2023, arXiv:2311.09578): one A and one B for all sites of a shape, scaled at each.

ΔW = s·diag(u)·B·diag(v)·A: u (out) and v (r) are trained for every site, A (r, in) and B (out, r) once for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from weightlora.methods.base import ExpandedMethod, Start, recorded, uniform_plan

if TYPE_CHECKING:
    from weightlora.plan.plan import AdapterPlan


@dataclass(kw_only=True, eq=False)
class TiedLora(ExpandedMethod):
    """Tied-LoRA at the budget's rank.

    Args:
        train_shared: Train A and B as well as u and v, the paper's configuration TL6. False keeps A and B random and
            trains only u and v, as in VeRA.
    """

    train_shared: bool = True

    def _planned(self, start: Start) -> AdapterPlan:
        r, alpha = start.lora.r, start.lora.lora_alpha
        return uniform_plan(start, r=r, alpha=alpha, rule="tied_lora", options=recorded(self))

    @torch.no_grad()
    def _change(self, layers: Mapping[str, Any]) -> None:
        """Make the A and B of all layers of a shape scaled copies of the first one's; v starts at 1, u at 0."""
        shared: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for layer in layers.values():
            a, b = layer.lora_A["default"], layer.lora_B["default"]
            shape = (layer.in_features, layer.out_features)
            if shape not in shared:
                nn.init.kaiming_uniform_(b.weight, a=5**0.5)  # as PEFT's A; u starts at 0 instead of B
                pair = (a.weight.clone(), b.weight.clone())
                shared[shape] = (nn.Parameter(pair[0]), nn.Parameter(pair[1])) if self.train_shared else pair
            for matrix, of_all, start in zip((a, b), shared[shape], (1.0, 0.0), strict=True):
                register_parametrization(matrix, "weight", Scaled(of_all, start))


build = TiedLora


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
