"""How much the loss would notice if a site's ΔW were gone: Σ|ΔW∘∂L/∂ΔW|, without a matrix of ΔW's size kept.

∂L/∂ΔW = gᵀ·x, with x the site's input and g the gradient of its output. Both pass by in a backward pass, and the sum is
made a block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle

_ENTRIES = 2**20  # of ∂L/∂ΔW that are there at once


def listen(layer: Any, hear: Callable[[Tensor, Tensor], None]) -> list[RemovableHandle]:
    """Let each backward pass call ``hear(x, g)`` with what A was given and the gradient of the layer's output.

    No tensor lives longer: autograd holds x for A's gradient until then.
    """
    given: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        given.append(output.detach())

    def wait(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        x = given.pop()
        if output.requires_grad:
            output.register_hook(partial(hear, x))

    return [layer.lora_dropout["default"].register_forward_hook(keep), layer.register_forward_hook(wait)]


@torch.no_grad()
def sensitivity(layer: Any, x: Tensor, gradient: Tensor) -> Tensor:
    """Return I = Σ|ΔW∘G| / √(d_out·d_in) with G = gᵀ·x, a block of rows of ΔW and G at a time.

    Args:
        layer: The site's adapter.
        x: What A was given, (..., in).
        gradient: g of the layer's output, (..., out).
    """
    a, b, e = (matrix["default"].detach() for matrix in (layer.lora_A, layer.lora_B, layer.lora_E))
    x, gradient = x.reshape(-1, x.shape[-1]).float(), gradient.reshape(-1, gradient.shape[-1]).float()
    scale = layer.scaling["default"] / (layer.ranknum["default"] + 1e-5)
    right, size = (scale * e * a).float(), max(1, _ENTRIES // x.shape[1])
    total = torch.zeros((), device=x.device)
    for left, g in zip(b.float().split(size), gradient.split(size, dim=1), strict=True):
        total += ((left @ right) * (g.T @ x)).abs().sum()
    return total / (x.shape[1] * gradient.shape[1]) ** 0.5
